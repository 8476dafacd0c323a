"""Coding: what all nets have in common that make codes of rows and rows of codes.

Shapes: B rows of the batch, D numbers of a row, K numbers of its code.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn import functional as F

from nn_models.activations import ACTIVATIONS, ActivationName, initialise
from nn_models.errors import UserError
from nn_models.model import Gives, ModelSpec
from nn_models.signature import Signature

UnitName = ActivationName | Literal["linear"]


class Coded(NamedTuple):
    """What a net gives that is asked for more than the rows again.

    `outputs` (B, *shape), `codes` (B, K), and `contraction` (B,), the squared Frobenius norm of the Jacobian of each
    row's code by the row; None where that was not asked for.
    """

    outputs: Tensor
    codes: Tensor
    contraction: Tensor | None = None


class CodingNet(nn.Module):
    """Base: h = f(x), r = g(h)."""

    def encode(self, x: Tensor) -> Tensor:
        """(B, *shape) -> codes (B, K)."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """(B, K) -> (B, *shape), without an activation unless the net has one there."""
        raise NotImplementedError

    def contraction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, K), and sum_kd (dh_k / dx_d)^2 (B,) of each row; K products with the Jacobian's transpose."""
        codes, pull, *_ = vjp(self.encode, x)
        basis = torch.eye(codes.shape[1], dtype=codes.dtype, device=codes.device)
        each_row = basis[:, None].expand(-1, len(codes), -1)  # (K, B, K): a row's code depends on that row alone
        (slopes,) = vmap(pull)(each_row)
        return codes, slopes.square().flatten(2).sum((0, 2))

    def forward(self, x: Tensor, *, keep_codes: bool = False, contraction: bool = False) -> Any:
        """(B, *shape) -> the same again, or Coded where codes or the contraction are asked for."""
        if not keep_codes and not contraction:
            return self.decode(self.encode(x))
        codes, norm = self.contraction(x) if contraction else (self.encode(x), None)
        return Coded(self.decode(codes), codes, norm)


class CodingSpec(ModelSpec):
    """Base of the descriptions of nets that make codes of rows and rows of codes."""

    gives: ClassVar[frozenset[Gives]] = frozenset({"reconstruction"})
    codes = True
    code: PositiveInt = Field(32, description="numbers of a row's code")

    def check_code(self, wanted: str, *, kind: str, why: str) -> None:
        """Raise UserError where codes are not of this activation, which an objective of this kind needs."""
        if getattr(self, "code_activation", None) != wanted:
            raise UserError("objective.kind", f"{kind} needs codes {why}", f"set model.code_activation to {wanted}")


class Unit(nn.Module):
    """A dense layer and its activation: f(W x + b)."""

    def __init__(self, num_inputs: int, num_outputs: int, *, activation: UnitName) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        initialise(self.linear, activation=None if activation == "linear" else activation)
        self.activation = nn.Identity() if activation == "linear" else ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        return self.activation(self.linear(x))

    def with_slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and f'(W x + b) (B, outputs)."""
        before = self.linear(x)
        after, pull, *_ = vjp(self.activation, before)
        (slopes,) = pull(torch.ones_like(after))  # of one number each, so forward and backward are the same
        return after, slopes


class TiedUnit(nn.Module):
    """f(W^T x + b) with the weights W of another dense layer and a bias of its own."""

    def __init__(self, of: nn.Linear, *, activation: UnitName) -> None:
        super().__init__()
        self.weight = of.weight
        self.bias = nn.Parameter(torch.zeros(of.in_features))
        self.activation = nn.Identity() if activation == "linear" else ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, the other's outputs) -> (B, the other's inputs)."""
        return self.activation(F.linear(x, self.weight.t(), self.bias))


class ConvolutionalEncoder(nn.Module):
    """Convolutions of 3 x 3 with stride 2, each halving height and width, rounding up; an activation after each."""

    def __init__(self, image_shape: Sequence[int], *, channels: Sequence[int], activation: ActivationName) -> None:
        super().__init__()
        num_channels, height, width = image_shape
        self.sizes = [(height, width)]
        self.layers = nn.Sequential()
        for block in channels:
            convolution = nn.Conv2d(num_channels, block, 3, stride=2, padding=1)
            initialise(convolution, activation=activation)
            self.layers.append(nn.Sequential(convolution, ACTIVATIONS[activation]()))
            num_channels, height, width = block, (height + 1) // 2, (width + 1) // 2
            self.sizes.append((height, width))
        self.output_shape = (num_channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, features)."""
        return self.layers(x).flatten(1)


class ConvolutionalDecoder(nn.Module):
    """The mirror image of an encoder: transposed convolutions that give each size back; no activation at the end."""

    def __init__(
        self, encoder: ConvolutionalEncoder, image_shape: Sequence[int], *, activation: ActivationName
    ) -> None:
        super().__init__()
        self.input_shape = encoder.output_shape
        self.layers = nn.Sequential()
        num_channels = encoder.output_shape[0]
        widths = [image_shape[0], *(layer[0].out_channels for layer in encoder.layers)][:-1]  # type: ignore[index]
        for place in reversed(range(len(widths))):
            height, width = encoder.sizes[place]
            even = (1 - height % 2, 1 - width % 2)  # an odd size was rounded up, so nothing is missing
            deconvolution = nn.ConvTranspose2d(num_channels, widths[place], 3, stride=2, padding=1, output_padding=even)
            initialise(deconvolution, activation=activation if place else None)
            after = ACTIVATIONS[activation]() if place else nn.Identity()
            self.layers.append(nn.Sequential(deconvolution, after))
            num_channels = widths[place]

    def forward(self, features: Tensor) -> Tensor:
        """(B, features) -> (B, C, H, W)."""
        return self.layers(features.unflatten(1, self.input_shape))


def smallest_side(signature: Signature, channels: Sequence[int]) -> None:
    """Raise UserError where the images are too small to be halved so often."""
    _, height, width = signature.input_shape
    most = (min(height, width) - 1).bit_length()  # until a pixel is left
    if len(channels) > most:
        raise UserError(
            "model.channels",
            f"{list(channels)} halves images {len(channels)} times, but those of {height}x{width} are a pixel after "
            f"{most}",
            f"shorten it to {most}" if most else "choose a dense model",
        )
