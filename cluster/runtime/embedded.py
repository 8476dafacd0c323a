"""Embedded: a Ray of our own for this machine alone: on loopback, with a token and a folder that nobody else has."""

import ipaddress
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed
from cluster.runtime.leftovers import clear_dead, own_folder
from nn_models.errors import UserError

RAY = "ray"  # Ray's folder in the session's own: Ray lets everybody into it, so the one around it is closed
LONGEST_SOCKET_PATH = 107 if sys.platform.startswith("linux") else 103  # bytes, see unix(7)
LONGEST_NAME_IN_FOLDER = len("/manta-12345678/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    # Prometheus' endpoints ask for no token. There is no such port: Ray notes so in its log, and goes on.
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


@contextmanager
def embedded_ray(ray: Any, **options: Any) -> Iterator[Path]:
    """Start Ray with these options of `ray.init`, and end it afterwards. Yields a folder of the session's own.

    Nothing of it is left afterwards. Raises UserError where there is no place for its files.
    """
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}  # only its processes know it: no file has it
    with ExitStack() as stack:
        folder = stack.enter_context(_own_folder())
        stack.enter_context(environment(SETTINGS | token))
        stack.callback(ray.shutdown)
        with _on_loopback():
            ray.init(
                address="local",  # never join a cluster that happens to run here
                include_dashboard=False,
                _temp_dir=str(folder / RAY),
                _system_config={"enable_metrics_collection": False},
                **options,
            )
        where = ray.util.get_node_ip_address()
        if not ipaddress.ip_address(where).is_loopback:  # a Ray that is not as we know it
            raise RunFailed(f"Ray {ray.__version__} listens on {where}, not on loopback alone")
        yield folder


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Have these environment variables while inside, and Ray know of them, which reads some of them once."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    from ray import _raylet

    internals: Any = _raylet  # compiled: its stub names few of them
    internals.Config.initialize("")  # as `ray.init` does where it chooses the mode itself
    internals.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray choose loopback as this machine's address, as it does on macOS, where it forms no clusters.

    `_node_ip_address="127.0.0.1"` is replaced by an address that others can reach.
    """
    from ray._private import ray_constants

    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder where Ray's sockets can be, in $RAY_TMPDIR or the system's place for temporary files."""
    asked = os.environ.get("RAY_TMPDIR")
    room = LONGEST_SOCKET_PATH - LONGEST_NAME_IN_FOLDER
    with ExitStack() as stack:
        try:
            base = Path(asked or tempfile.gettempdir())
            if len(os.fsencode(base)) > room:
                if asked:
                    problem = f"{asked} is too long for the paths of Ray's sockets"
                    raise UserError("RAY_TMPDIR", problem, f"choose one of at most {room} characters")
                base = Path("/tmp")
            base.mkdir(parents=True, exist_ok=True)
            clear_dead(base)
            folder = stack.enter_context(own_folder(base))
        except OSError as error:  # also where no place for temporary files has room
            place = error.filename or "the place for temporary files"
            raise UserError(
                place, f"cannot be written ({error.strerror})", "make room there, or set RAY_TMPDIR to another"
            ) from None
        yield folder
