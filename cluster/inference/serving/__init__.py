"""A trained model behind HTTP, by Ray Serve: on this machine, many requests at once in one pass of the model."""

from importlib.util import find_spec

from nn_models.errors import UserError

NEEDED = ("fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart")  # ray[serve] has all but the last


def check_installed() -> None:
    """Raise UserError where a package of the extra `serve` is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        message = f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError("serve", message, "pip install 'manta-train[serve]'")
