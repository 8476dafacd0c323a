"""ModelSpec: the base of every model's description."""

from typing import ClassVar

from torch import nn

from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.spec import Spec


class ModelSpec(Spec):
    """Base of every model's description. `accepts` names the input kinds that the model can read."""

    accepts: ClassVar[frozenset[str]] = frozenset({"features", "image"})
    kind: str

    def check(self, signature: Signature) -> None:
        """Raise UserError where the model cannot read such rows."""
        if signature.input_kind not in self.accepts:
            raise UserError(
                "model.kind",
                f"{self.kind} reads {' or '.join(sorted(self.accepts))} input, but the data has "
                f"{signature.input_kind} input of shape {signature.input_shape}",
                "choose another model or data set",
            )

    def build(self, signature: Signature) -> "nn.Module":
        """The module, freshly initialised from torch's global generator."""
        raise NotImplementedError
