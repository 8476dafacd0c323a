"""Image to image: pix2pix, a U-Net that turns one image into another, against a discriminator of patches.

Called as all adversarial nets are (see adversarial.py). Shapes: B rows of the batch, C channels of the images made,
C' of the images given (the condition), H and W height and width, h and w patches along each.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from nn_models.activations import initialise_like_dcgan, normalise_spectrum
from nn_models.adversarial import MAX_WIDENING, SLOPE, AdversarialSpec
from nn_models.columns import Image
from nn_models.errors import UserError
from nn_models.model import reading
from nn_models.signature import Signature

Norm = Literal["instance", "batch"]
NORMS: dict[Norm, type[nn.BatchNorm2d] | type[nn.InstanceNorm2d]] = {
    "instance": nn.InstanceNorm2d,
    "batch": nn.BatchNorm2d,
}
MAX_LEVELS = 8  # 256 x 256 down to one pixel; Isola et al. 2016, section 6.1
MAX_PATCH_LEVELS = 3  # 70 x 70 pixels a logit
MOST_HALVINGS = 14  # of a side of 16,384, the largest


class DropoutNoise(nn.Module):
    """Dropout that stays on in evaluation: the only noise of pix2pix (Isola et al. 2016, section 3.1)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; drawn from torch's global generator."""
        return F.dropout(x, self.p, training=True)


class UNet(nn.Module):
    """Encoder and decoder of L levels, each level of the one joined to the same level of the other.

        e_0 = condition        e_l = norm(conv(leaky(e_(l-1))))                                l = 1 ... L
        d_L = e_L              d_(l-1) = [dropout(norm(deconv(relu(d_l)))), e_(l-1)]           l = L ... 2
        image = tanh(deconv(relu(d_1)))

    (Ronneberger et al. 2015; Isola et al. 2016, section 6.1.) Kernels are 4 x 4 with stride 2; e_1 has `width`
    channels, each level twice as many as the last, at most 8 times as many. Neither e_1, which has no activation
    before it either, nor e_L is normalised: e_L may be a single pixel. Dropout stands in the first three layers of the
    decoder, or in its first half where that is less. An odd side is halved rounding down, and the decoder adds the
    missing line: any size fits, 28 -> 14 -> 7 -> 3 -> 1 too. For 256 x 256 and 3 channels on either side it has
    the 54,413,955 parameters of the authors' PyTorch implementation.
    """

    def __init__(
        self,
        condition_shape: Sequence[int],
        num_outputs: int,
        *,
        levels: int,
        width: int,
        norm: Norm,
        dropout: float,
    ) -> None:
        super().__init__()
        num_channels, height, image_width = condition_shape
        channels = [num_channels, *(width * min(2**level, MAX_WIDENING) for level in range(levels))]
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()  # from the bottom up
        for level in range(1, levels + 1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if level > 1:
                layers["activation"] = nn.LeakyReLU(SLOPE)
            layers["convolution"] = nn.Conv2d(channels[level - 1], channels[level], 4, stride=2, padding=1, bias=False)
            if 1 < level < levels:
                layers["norm"] = NORMS[norm](channels[level], affine=True)
            self.encoder.append(nn.Sequential(layers))
        for level in range(levels, 0, -1):
            missing = (height >> (level - 1) & 1, image_width >> (level - 1) & 1)
            in_channels = channels[level] * (1 if level == levels else 2)  # below the top, joined by the encoder's
            out_channels = channels[level - 1] if level > 1 else num_outputs
            deconvolution = nn.ConvTranspose2d(
                in_channels, out_channels, 4, stride=2, padding=1, output_padding=missing, bias=level == 1
            )
            layers = OrderedDict(activation=nn.ReLU(), convolution=deconvolution)
            if level > 1:
                layers["norm"] = NORMS[norm](out_channels, affine=True)
                if levels - level < min(3, levels // 2):
                    layers["dropout"] = DropoutNoise(dropout)
            else:
                layers["squash"] = nn.Tanh()
            self.decoder.append(nn.Sequential(layers))
        initialise_like_dcgan(self)

    def forward(self, source: Tensor, condition: Tensor) -> Tensor:
        """Images (B, C', H, W) -> (B, C, H, W) in [-1, 1]; the source is not looked at."""
        x = condition
        skipped: list[Tensor] = []
        for layer in self.encoder:
            x = layer(x)
            skipped.append(x)
        x = skipped.pop()
        for layer in self.decoder:
            x = layer(x)
            if skipped:
                x = torch.cat((x, skipped.pop()), dim=1)
        return x


class PatchDiscriminator(nn.Module):
    """Judges each patch of the pair (condition, image) by itself: PatchGAN (Isola et al. 2016, sections 3.2, 6.1).

    `levels` 4 x 4 convolutions with stride 2, then two with stride 1. A logit sees r x r pixels:

        r_0 = 1 + 3 + 3 = 7        r_l = 2 r_(l-1) + 2        r_1 = 16, r_2 = 34, r_3 = 70

    LeakyReLU follows each layer but the last, normalisation each but the first and the last. With 3 levels and
    3 channels in either image it has the 2,768,705 parameters of the authors' PyTorch implementation.
    """

    def __init__(self, num_channels: int, *, levels: int, width: int, norm: Norm, spectral_norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for level in range(levels + 1):
            out_channels = width * min(2**level, MAX_WIDENING)
            convolution = nn.Conv2d(
                num_channels, out_channels, 4, stride=2 if level < levels else 1, padding=1, bias=level == 0
            )
            layers: OrderedDict[str, nn.Module] = OrderedDict(convolution=convolution)
            if level:
                layers["norm"] = NORMS[norm](out_channels, affine=True)
            layers["activation"] = nn.LeakyReLU(SLOPE)
            self.layers.append(nn.Sequential(layers))
            num_channels = out_channels
        self.output = nn.Conv2d(num_channels, 1, 4, padding=1)
        initialise_like_dcgan(self)
        if spectral_norm:
            for layer in [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]:
                normalise_spectrum(layer)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Images (B, C, H, W) and (B, C', H, W) -> logits (B, 1, h, w)."""
        return self.output(self.layers(torch.cat((condition, images), dim=1)))


class Pix2PixSpec(AdversarialSpec):
    """pix2pix (Isola et al. 2016): turns one image into another; a U-Net against a judge of patches."""

    reads = reading(input=Image, condition=Image)
    given = "condition"
    norm_field = ("norm", "instance")
    kind: Literal["pix2pix"] = "pix2pix"
    noise_size: Literal[0] = Field(0, description="0: pix2pix draws no noise but its dropout")
    levels: PositiveInt | None = Field(
        None, le=MOST_HALVINGS, description=f"halvings in the U-Net; by default down to one pixel, at most {MAX_LEVELS}"
    )
    patch_levels: PositiveInt | None = Field(
        None,
        le=MOST_HALVINGS,
        description="halvings in the discriminator, which judges patches of 16x16 pixels after 1, 34x34 after 2, 70x70 "
        "after 3; by default 3 for images of 128x128 or more, 2 from 64x64, else 1",
    )
    width: PositiveInt = Field(
        64, description="channels after the first halving; twice as many at each next, at most 8 times as many"
    )
    norm: Norm = Field(
        "instance",
        description="normalise each image by itself, as the paper's batches of one do, or over the batch",
    )
    dropout: float = Field(
        0.5, ge=0, lt=1, description="share dropped in the decoder's first layers, in evaluation too: it is the noise"
    )

    @property
    def discriminator_mixes_rows(self) -> bool:
        """Whether the discriminator normalises over the batch."""
        return self.norm == "batch"

    def check(self, signature: Signature) -> None:
        """Raise UserError where the data are no pairs of images of one size, or too small for all the halvings."""
        if "condition" not in signature and isinstance(signature["input"], Image):
            raise UserError(
                "model.kind",
                f"{self.kind} turns one image into another, but the data has only one image a row",
                "choose a data set of image pairs, or set model.kind to dcgan",
            )
        super().check(signature)
        _, height, width = signature.input_shape
        if signature["condition"].row_shape[1:] != (height, width):
            raise UserError(
                "model.kind",
                f"{self.kind} needs both images of a pair in one size, but the data has shapes "
                f"{signature.condition_shape} and {signature.input_shape}",
                "resize one of them",
            )
        min_size = 6  # for the discriminator's stride 1 convolutions, after one halving
        if min(height, width) < min_size:
            raise UserError(
                "model.kind",
                f"{self.kind} needs images of at least {min_size}x{min_size}, but the data has {height}x{width}",
                "enlarge the images",
            )
        for field, value, largest, min_size in (
            ("levels", self.levels, _log2(min(height, width)), 2 ** (self.levels or 1)),
            ("patch_levels", self.patch_levels, _log2(min(height, width) // 3), 3 * 2 ** (self.patch_levels or 1)),
        ):
            if value is not None and value > largest:
                raise UserError(
                    f"model.{field}",
                    f"{value} halvings need images of at least {min_size}x{min_size}, but the data has "
                    f"{height}x{width}",
                    f"lower model.{field} to {largest} or leave it out",
                )

    def build_generator(self, signature: Signature) -> UNet:
        """Images of `signature.condition_shape` -> images of `signature.input_shape`."""
        assert signature.condition_shape is not None  # check() refuses it
        return UNet(
            signature.condition_shape,
            signature.input_shape[0],
            levels=self.levels or min(_log2(min(signature.input_shape[1:])), MAX_LEVELS),
            width=self.width,
            norm=self.norm,
            dropout=self.dropout,
        )

    def build_discriminator(self, signature: Signature) -> PatchDiscriminator:
        """Images of `signature.input_shape` and of `signature.condition_shape` -> logits (B, 1, h, w)."""
        assert signature.condition_shape is not None  # check() refuses it
        return PatchDiscriminator(
            signature.input_shape[0] + signature.condition_shape[0],
            levels=self.patch_levels or min(max(1, _log2(min(signature.input_shape[1:])) - 4), MAX_PATCH_LEVELS),
            width=self.width,
            norm=self.norm,
            spectral_norm=self.spectral_norm,
        )


def _log2(size: int) -> int:
    """How often a side can be halved, rounding down, before nothing is left; size >= 1."""
    return size.bit_length() - 1
