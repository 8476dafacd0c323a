"""What is trained: models, their Specs and objectives, in plain PyTorch.

`nn_models.build({"kind": "mlp"}, nn_models.Signature(input_shape=(64,), num_outputs=10))` gives a `torch.nn.Module`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nn_models.errors import UserError
    from nn_models.model import ModelSpec
    from nn_models.signature import Signature
    from nn_models.spec import Spec, override, validate
    from nn_models.zoo import MODELS, AnyModelSpec, build

__all__ = ["MODELS", "AnyModelSpec", "ModelSpec", "Signature", "Spec", "UserError", "build", "override", "validate"]

_HOMES = {
    "MODELS": "zoo",
    "AnyModelSpec": "zoo",
    "ModelSpec": "model",
    "Signature": "signature",
    "Spec": "spec",
    "UserError": "errors",
    "build": "zoo",
    "override": "spec",
    "validate": "spec",
}


def __getattr__(name: str) -> Any:  # PEP 562: torch and pydantic are imported when something needs them
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
