"""Autoencoders: dense and convolutional nets that give a row again by way of a code of fewer numbers.

Shapes: B rows of the batch, D numbers of a row, H units of a hidden layer, K numbers of a code.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from nn_models.activations import ACTIVATIONS, ActivationName
from nn_models.batch import Batch
from nn_models.coding import (
    CodingNet,
    CodingSpec,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    TiedUnit,
    Unit,
    UnitName,
    smallest_side,
)
from nn_models.columns import Image
from nn_models.model import Batching, reading
from nn_models.signature import Signature


class Autoencoder(CodingNet):
    """Dense layers to a code and, mirrored, back (Rumelhart, Hinton & Williams 1986; Hinton & Salakhutdinov 2006).

        h_0 = x            h_l = f(W_l h_(l-1) + b_l)          h = f_code(W_L h_(L-1) + b_L)
        r_L = h            r_(l-1) = f(V_l r_l + c_l)          r = V_1 r_1 + c_1

    Tied weights are V_l = W_l^T. Without hidden layers, with linear codes and the squared error, h spans the same
    subspace as the first K principal components (Baldi & Hornik 1989).
    """

    def __init__(
        self,
        row_shape: Sequence[int],
        *,
        hidden: Sequence[int],
        code: int,
        activation: UnitName,
        code_activation: UnitName,
        tied: bool,
    ) -> None:
        super().__init__()
        self.row_shape = tuple(row_shape)
        widths = [torch.Size(row_shape).numel(), *hidden, code]
        self.encoder = nn.Sequential()
        for place, (inputs, outputs) in enumerate(pairwise(widths)):
            last = place == len(hidden)
            self.encoder.append(Unit(inputs, outputs, activation=code_activation if last else activation))
        self.decoder = nn.Sequential()
        for place in reversed(range(len(widths) - 1)):
            after: UnitName = activation if place else "linear"
            if tied:
                mirrored = self.encoder[place]
                assert isinstance(mirrored, Unit)
                self.decoder.append(TiedUnit(mirrored.linear, activation=after))
            else:
                self.decoder.append(Unit(widths[place + 1], widths[place], activation=after))

    def encode(self, x: Tensor) -> Tensor:
        """See CodingNet."""
        return self.encoder(x.flatten(1))

    def decode(self, codes: Tensor) -> Tensor:
        """See CodingNet."""
        return self.decoder(codes).unflatten(1, self.row_shape)

    def contraction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See CodingNet; in closed form.

        Of one layer it is sum_k f'(a_k)^2 sum_d W_kd^2 (Rifai et al. 2011, section 5). Of several the Jacobian is
        diag(f'_L) W_L ... diag(f'_1) W_1, and the last product's norm needs W_1 W_1^T only, so no matrix has D columns.
        """
        values, slopes = x.flatten(1), []
        for layer in self.encoder:
            assert isinstance(layer, Unit)
            values, of_layer = layer.with_slopes(values)
            slopes.append(of_layer)
        weights = [layer.linear.weight for layer in self.encoder if isinstance(layer, Unit)]
        if len(weights) == 1:
            return values, slopes[0].square() @ weights[0].square().sum(1)
        product = weights[-1] * slopes[-2][:, None]  # (B, K, H)
        for place in reversed(range(1, len(weights) - 1)):
            product = (product @ weights[place]) * slopes[place - 1][:, None]
        gram = weights[0] @ weights[0].t()
        norms = ((product @ gram) * product).sum(2)  # (B, K): of the rows of the Jacobian before f'_L
        return values, (slopes[-1].square() * norms).sum(1)


class ConvAutoencoder(CodingNet):
    """Convolutions with stride 2, dense layers to a code, and all of it mirrored (Masci et al. 2011).

    A transposed convolution is the mirror image of one with stride 2: it doubles height and width, less a line where
    the size was odd. The last one has no activation.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        channels: Sequence[int],
        hidden: Sequence[int],
        code: int,
        activation: ActivationName,
        code_activation: UnitName,
    ) -> None:
        super().__init__()
        self.convolutions = ConvolutionalEncoder(image_shape, channels=channels, activation=activation)
        shape = self.convolutions.output_shape
        self.dense = Autoencoder(
            (torch.Size(shape).numel(),),
            hidden=hidden,
            code=code,
            activation=activation,
            code_activation=code_activation,
            tied=False,
        )
        self.between = ACTIVATIONS[activation]()
        self.deconvolutions = ConvolutionalDecoder(self.convolutions, image_shape, activation=activation)

    def encode(self, x: Tensor) -> Tensor:
        """See CodingNet."""
        return self.dense.encode(self.convolutions(x))

    def decode(self, codes: Tensor) -> Tensor:
        """See CodingNet."""
        return self.deconvolutions(self.between(self.dense.decode(codes)))


class AutoencoderSpec(CodingSpec):
    """Dense autoencoder: layers to a code and, mirrored, back; flattens images."""

    sections = ("components", "filters")
    kind: Literal["autoencoder"] = "autoencoder"
    hidden: tuple[PositiveInt, ...] = Field((256,), description="units of each layer before the code; [] for none")
    activation: UnitName = Field("relu", description="what follows each hidden layer")
    code_activation: UnitName = Field("linear", description="what the code is squashed by")
    tied: bool = Field(False, description="the decoder's weights are the encoder's, transposed")

    def build(self, signature: Signature) -> Autoencoder:
        """The module: rows of `signature.input_shape` -> the same shape."""
        return Autoencoder(signature.input_shape, **self.settings())

    @property
    def batches(self) -> Batching:
        """See ModelSpec."""
        return "vmap"

    @torch.no_grad()
    def inspect(self, model: nn.Module, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """See ModelSpec. Of a linear net `components/decoder` (K, D): what each number of a code adds to a row."""
        if self.hidden or self.code_activation != "linear":
            return {}
        assert isinstance(model, Autoencoder)
        device = next(model.parameters()).device
        none = model.decode(torch.zeros(1, self.code, device=device))
        added = model.decode(torch.eye(self.code, device=device)) - none
        return {"components/decoder": added.flatten(1).float().cpu().contiguous()}


class ConvAutoencoderSpec(CodingSpec):
    """Convolutional autoencoder: convolutions and dense layers to a code and, mirrored, back."""

    reads = reading(input=Image)
    kind: Literal["conv_autoencoder"] = "conv_autoencoder"
    channels: tuple[PositiveInt, ...] = Field(
        (32, 64), min_length=1, description="kernels of each convolution, which halves height and width"
    )
    hidden: tuple[PositiveInt, ...] = Field((), description="units of each dense layer before the code")
    activation: ActivationName = Field("relu", description="what follows each convolution and hidden layer")
    code_activation: UnitName = Field("linear", description="what the code is squashed by")

    def check(self, signature: Signature) -> None:
        """Raise UserError where the data are no images, or too small to be halved so often."""
        super().check(signature)
        smallest_side(signature, self.channels)

    def build(self, signature: Signature) -> ConvAutoencoder:
        """The module: images of `signature.input_shape` -> the same shape."""
        return ConvAutoencoder(signature.input_shape, **self.settings())


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles in degrees, the largest first, between the spans of the columns of (D, K) and (D, K') matrices.

    By Knyazev & Argentati 2002: from the sines where these are small, as cosines are flat there.
    """
    bases = [torch.linalg.qr(matrix.double()).Q for matrix in (first, second)]
    if bases[0].shape[1] < bases[1].shape[1]:
        bases.reverse()
    across = bases[0].T @ bases[1]
    cosines = torch.linalg.svdvals(across).clamp(max=1).flip(0)
    sines = torch.linalg.svdvals(bases[1] - bases[0] @ across).clamp(max=1)
    angles = torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())
    return angles.rad2deg()
