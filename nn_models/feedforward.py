"""Feedforward nets: the multilayer perceptron.

Shapes: B rows of the batch, D inputs, H units of a hidden layer, K outputs.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from nn_models.activations import ACTIVATIONS, ActivationName, initialise
from nn_models.model import Batching, ModelSpec
from nn_models.signature import Signature


class MLP(nn.Module):
    """Dense layers with an activation between them (Rumelhart, Hinton & Williams 1986).

        h_0 = x
        h_l = dropout(f(norm(W_l h_(l-1) + b_l)))        l = 1 ... L
        y   = W_(L+1) h_L + b_(L+1)

    The output has no activation: y are logits or predicted numbers. Without hidden layers this is softmax
    (or linear) regression. Normalisation is Ioffe & Szegedy 2015 and brings its own bias, so b_l is then left out;
    dropout is Srivastava et al. 2014.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        hidden: Sequence[int],
        activation: ActivationName,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.hidden = nn.Sequential()
        for width in hidden:
            linear = nn.Linear(num_inputs, width, bias=not batch_norm)
            initialise(linear, activation=activation)
            layers: OrderedDict[str, nn.Module] = OrderedDict(linear=linear)
            if batch_norm:
                layers["norm"] = nn.BatchNorm1d(width)
            layers["activation"] = ACTIVATIONS[activation]()
            layers["dropout"] = nn.Dropout(dropout)
            self.hidden.append(nn.Sequential(layers))
            num_inputs = width
        self.output = nn.Linear(num_inputs, num_outputs)
        initialise(self.output, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D), or (B, channels, height, width) to be flattened, -> (B, K)."""
        return self.output(self.hidden(x.flatten(1)))


class MLPSpec(ModelSpec):
    """Multilayer perceptron: dense layers with an activation between them; flattens images."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = Field((128,), description="units of each hidden layer; [] for none")
    activation: ActivationName = Field("relu", description="what follows each hidden layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each hidden layer's outputs dropped in training")
    batch_norm: bool = Field(False, description="normalise each hidden layer over the batch before its activation")

    def build(self, signature: Signature) -> MLP:
        """The module: rows of `signature.input_shape` -> (B, num_outputs)."""
        return MLP(signature.input_size, signature.num_outputs, **self.settings())

    @property
    def batches(self) -> Batching:
        """See ModelSpec."""
        return "wide"

    def quicker_fused(self, signature: Signature, num_rows: int) -> bool:
        """See ModelSpec."""
        return True
