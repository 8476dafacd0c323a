"""Adversarial nets: a generator and a discriminator that learn against each other: GAN, DCGAN, conditional GAN.

Shapes: B rows of the batch, N numbers of noise, C channels, H and W height and width, E of a label's embedding.

All kinds (pix2pix too, in pix2pix.py) are called alike, so that training needs no special cases:

    images = generator(source, condition)        logits = discriminator(images, condition)

- `source` (B, noise_size): standard normal noise; (B, 0) where the spec's `noise_size` is 0.
- `condition`: of the column that the spec is `given`: labels (B,), int64, of the target; images (B, C', H, W) in
  [-1, 1] of the condition. Where it is given none, it may be None and is not looked at.
- `images` (B, C, H, W) in [-1, 1], real ones too; feature vectors (B, D), whatever their range.
- `logits` (B,), or (B, 1, h, w) where the discriminator judges h x w patches: positive for "real".
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from nn_models.activations import initialise, initialise_like_dcgan, normalise_spectrum
from nn_models.columns import Image, Label, Scale
from nn_models.errors import UserError
from nn_models.feedforward import MLP
from nn_models.model import ModelSpec, reading
from nn_models.signature import Signature

SLOPE = 0.2  # of LeakyReLU below zero; Radford et al. 2015, section 4
MAX_WIDENING = 8  # a layer has at most so many times the channels of the one next to the image

DiscriminatorNorm = Literal["batch", "layer", "none"]


class Halves(nn.Module):
    """Both halves of a GAN in one module, for what wants a single one: saved weights, tables of layers.

    Training keeps them apart: it calls the Spec's `build_generator` and `build_discriminator`.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator

    def forward(self, source: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the generator makes: (B, noise_size) and the condition -> images (B, C, H, W)."""
        return self.generator(source, condition)


class AdversarialSpec(ModelSpec):
    """Base of the descriptions that make two modules; how these are called stands on top of this file."""

    given: ClassVar[str | None] = None  # the column that says what is to be made of the noise; None for noise alone
    norm_field: ClassVar[tuple[str, str]] = ("discriminator_norm", "layer")  # and the value that mixes no rows
    gives = frozenset({"halves"})
    noise_size: PositiveInt = Field(100, description="standard normal numbers that a row is made from")
    spectral_norm: bool = Field(
        False, description="divide each weight matrix of the discriminator by its largest singular value"
    )

    @property
    def scale(self) -> Scale:
        """See ModelSpec."""
        return "symmetric"

    @property
    def discriminator_mixes_rows(self) -> bool:
        """Whether what the discriminator says of a row depends on the other rows of the batch."""
        raise NotImplementedError

    def build_generator(self, signature: Signature) -> nn.Module:
        """The generator, freshly initialised from torch's global generator."""
        raise NotImplementedError

    def build_discriminator(self, signature: Signature) -> nn.Module:
        """The discriminator, freshly initialised from torch's global generator."""
        raise NotImplementedError

    def build(self, signature: Signature) -> Halves:
        """Both halves, the generator drawn first; calling the module runs the generator."""
        return Halves(self.build_generator(signature), self.build_discriminator(signature))


# -- dense ---------------------------------------------------------------------------------------------------------


class DenseGenerator(nn.Module):
    """Dense layers with rectifiers from noise to a row; tanh keeps images in [-1, 1], features are left free."""

    def __init__(self, noise_size: int, output_shape: Sequence[int], *, hidden: Sequence[int]) -> None:
        super().__init__()
        self.output_shape = tuple(output_shape)
        self.dense = MLP(
            noise_size,
            torch.Size(output_shape).numel(),
            hidden=hidden,
            activation="relu",
            dropout=0.0,
            batch_norm=False,
        )
        self.squash = nn.Tanh() if len(self.output_shape) == 3 else nn.Identity()

    def forward(self, source: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, N) -> (B, *output_shape); the condition is not looked at."""
        return self.squash(self.dense(source)).unflatten(1, self.output_shape)


class Maxout(nn.Module):
    """h_i = max_j (w_ij x + b_ij), the largest of `pieces` linear functions (Goodfellow et al. 2013, section 3)."""

    def __init__(self, num_inputs: int, num_units: int, *, pieces: int, spectral_norm: bool) -> None:
        super().__init__()
        self.pieces = pieces
        linear = nn.Linear(num_inputs, num_units * pieces)
        initialise(linear, activation=None)
        self.linear = normalise_spectrum(linear) if spectral_norm else linear

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_inputs) -> (B, num_units)."""
        return self.linear(x).unflatten(1, (-1, self.pieces)).amax(2)


class DenseDiscriminator(nn.Module):
    """Dense layers of maxout or LeakyReLU units with dropout, then one logit."""

    def __init__(
        self,
        num_inputs: int,
        *,
        hidden: Sequence[int],
        activation: Literal["leaky_relu", "maxout"],
        pieces: int,
        dropout: float,
        spectral_norm: bool,
    ) -> None:
        super().__init__()
        self.hidden = nn.Sequential()
        for width in hidden:
            if activation == "maxout":
                layer: nn.Module = Maxout(num_inputs, width, pieces=pieces, spectral_norm=spectral_norm)
            else:
                linear = nn.Linear(num_inputs, width)
                initialise(linear, activation="leaky_relu")
                layer = nn.Sequential(normalise_spectrum(linear) if spectral_norm else linear, nn.LeakyReLU(SLOPE))
            self.hidden.append(nn.Sequential(layer, nn.Dropout(dropout)))
            num_inputs = width
        output = nn.Linear(num_inputs, 1)
        initialise(output, activation=None)
        self.output = normalise_spectrum(output) if spectral_norm else output

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, D), or (B, C, H, W) to be flattened, -> (B,); the condition is not looked at."""
        return self.output(self.hidden(images.flatten(1))).squeeze(1)


class GANSpec(AdversarialSpec):
    """GAN (Goodfellow et al. 2014): dense generator and discriminator, for images or features."""

    kind: Literal["gan"] = "gan"
    generator_hidden: tuple[PositiveInt, ...] = Field(
        (256, 512), description="units of the generator's hidden layers; [] for none"
    )
    discriminator_hidden: tuple[PositiveInt, ...] = Field(
        (512, 256), description="units of the discriminator's hidden layers; [] for none"
    )
    activation: Literal["leaky_relu", "maxout"] = Field(
        "leaky_relu", description="the discriminator's hidden units; maxout in the paper"
    )
    pieces: PositiveInt = Field(5, description="linear functions that a maxout unit takes the largest of")
    dropout: float = Field(0.3, ge=0, lt=1, description="share of the discriminator's hidden units dropped in training")

    @property
    def discriminator_mixes_rows(self) -> bool:
        """False: no batch normalisation."""
        return False

    def build_generator(self, signature: Signature) -> DenseGenerator:
        """Noise (B, noise_size) -> rows of `signature.input_shape`."""
        return DenseGenerator(self.noise_size, signature.input_shape, hidden=self.generator_hidden)

    def build_discriminator(self, signature: Signature) -> DenseDiscriminator:
        """Rows of `signature.input_shape` -> logits (B,)."""
        return DenseDiscriminator(
            signature.input_size,
            hidden=self.discriminator_hidden,
            activation=self.activation,
            pieces=self.pieces,
            dropout=self.dropout,
            spectral_norm=self.spectral_norm,
        )


# -- convolutional -------------------------------------------------------------------------------------------------


def num_halvings(height: int, width: int) -> int:
    """How often a DCGAN halves such images: down to 4 to 7 pixels on the shorter side, but at least twice.

    Twice even where 8 pixels become 2: halved once, the discriminator has one hidden layer and is too weak a critic
    (3,000 steps on the 8 x 8 digits: Frechet distance 5.4; halved twice 0.7, as near as real rows to real ones).
    """
    return max(2, (min(height, width) // 4).bit_length() - 1)


class DCGANGenerator(nn.Module):
    """Transposed convolutions that double the image from about 4 x 4 pixels (Radford et al. 2015, figure 1).

    An image is halved n times to its base, h x w = H / 2^n x W / 2^n: 64 -> 4 (n = 4), 32 -> 4 (n = 3), 28 -> 7,
    16 -> 4 and 8 -> 2 (n = 2). From noise, seen as a 1 x 1 image, an h x w kernel makes the base; each further kernel,
    4 x 4 with stride 2, doubles it. `width` channels stand before the image, twice as many one layer deeper, at most 8
    times as many. Batch normalisation and ReLU follow each layer but the last, which has tanh. No layer has biases.
    For 64 x 64 and 3 channels it has the 3,576,704 parameters of the usual implementation.
    """

    def __init__(self, noise_size: int, image_shape: Sequence[int], *, width: int) -> None:
        super().__init__()
        num_channels, height, image_width = image_shape
        halvings = num_halvings(height, image_width)
        base = (height >> halvings, image_width >> halvings)
        channels = [width * min(2**level, MAX_WIDENING) for level in reversed(range(halvings))]
        self.layers = nn.Sequential(self._layer(nn.ConvTranspose2d(noise_size, channels[0], base, bias=False)))
        for wide, narrow in pairwise(channels):
            self.layers.append(self._layer(nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False)))
        image = nn.ConvTranspose2d(channels[-1], num_channels, 4, stride=2, padding=1, bias=False)
        self.layers.append(nn.Sequential(OrderedDict(convolution=image, activation=nn.Tanh())))
        initialise_like_dcgan(self)

    @staticmethod
    def _layer(convolution: nn.ConvTranspose2d) -> nn.Sequential:
        norm = nn.BatchNorm2d(convolution.out_channels)
        return nn.Sequential(OrderedDict(convolution=convolution, norm=norm, activation=nn.ReLU()))

    def forward(self, source: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, N) -> (B, C, H, W) in [-1, 1]; the condition is not looked at."""
        return self.layers(source[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """The generator's mirror image: 4 x 4 kernels with stride 2 halve the image, an h x w kernel gives the logit.

    LeakyReLU follows each layer but the last, normalisation each but the first and the last (Radford et al. 2015,
    section 3); "layer" normalises over a row's channels and pixels together. Only with norm "none" do layers have
    biases. For 64 x 64 and 3 channels it has the 2,765,568 parameters of the usual implementation.
    """

    def __init__(self, image_shape: Sequence[int], *, width: int, norm: DiscriminatorNorm, spectral_norm: bool) -> None:
        super().__init__()
        num_channels, height, image_width = image_shape
        halvings = num_halvings(height, image_width)
        bias = norm == "none"
        self.layers = nn.Sequential()
        for level in range(halvings):
            out_channels = width * min(2**level, MAX_WIDENING)
            convolution = nn.Conv2d(num_channels, out_channels, 4, stride=2, padding=1, bias=bias)
            layers: OrderedDict[str, nn.Module] = OrderedDict(convolution=convolution)
            if level and norm != "none":
                layers["norm"] = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.GroupNorm(1, out_channels)
            layers["activation"] = nn.LeakyReLU(SLOPE)
            self.layers.append(nn.Sequential(layers))
            num_channels = out_channels
        base = (height >> halvings, image_width >> halvings)
        self.output = nn.Conv2d(num_channels, 1, base, bias=bias)
        initialise_like_dcgan(self)
        if spectral_norm:
            for layer in [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]:
                normalise_spectrum(layer)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B,); the condition is not looked at."""
        return self.output(self.layers(images)).flatten()


class ConditionalGenerator(nn.Module):
    """A DCGAN generator whose source is noise and an embedding of the label (Mirza & Osindero 2014, section 3.2)."""

    def __init__(
        self, noise_size: int, num_classes: int, image_shape: Sequence[int], *, embedding_size: int, width: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding_size)  # N(0, 1), as the noise
        self.trunk = DCGANGenerator(noise_size + embedding_size, image_shape, width=width)

    def forward(self, source: Tensor, condition: Tensor) -> Tensor:
        """(B, N) and labels (B,) -> (B, C, H, W) in [-1, 1]."""
        source_BNE = torch.cat((source, self.embedding(condition)), dim=1)
        return self.trunk(source_BNE)


class ConditionalDiscriminator(nn.Module):
    """A DCGAN discriminator that sees the label as one more channel: a learned H x W picture of each class."""

    def __init__(
        self,
        num_classes: int,
        image_shape: Sequence[int],
        *,
        width: int,
        norm: DiscriminatorNorm,
        spectral_norm: bool,
    ) -> None:
        super().__init__()
        num_channels, *self.size = image_shape
        self.embedding = nn.Embedding(num_classes, self.size[0] * self.size[1])
        self.trunk = DCGANDiscriminator(
            (num_channels + 1, *self.size), width=width, norm=norm, spectral_norm=spectral_norm
        )

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """(B, C, H, W) and labels (B,) -> (B,)."""
        plane_B1HW = self.embedding(condition).unflatten(1, (1, *self.size))
        return self.trunk(torch.cat((images, plane_B1HW), dim=1))


class ConvolutionalAdversarialSpec(AdversarialSpec):
    """Base of those built of DCGAN's layers."""

    reads = reading(input=Image)
    width: PositiveInt = Field(
        64, description="channels next to the image; twice as many one layer deeper, at most 8 times as many"
    )
    discriminator_norm: DiscriminatorNorm = Field(
        "batch",
        description="what the discriminator's inner layers are normalised over; a gradient penalty needs another",
    )

    @property
    def discriminator_mixes_rows(self) -> bool:
        """Whether the discriminator normalises over the batch."""
        return self.discriminator_norm == "batch"

    def check(self, signature: Signature) -> None:
        """Raise UserError where the data are no images, or images that cannot be halved so often."""
        super().check(signature)
        _, height, width = signature.input_shape
        halvings = num_halvings(height, width)
        unit = 2**halvings
        if height % unit or width % unit or min(height, width) < 2 * unit:
            fitting = [max(2, round(size / unit)) * unit for size in (height, width)]
            raise UserError(
                "model.kind",
                f"{self.kind} halves such images {halvings} times, so both sides must be multiples of {unit}, at "
                f"least {2 * unit}, but the data has {height}x{width}",
                f"resize the images to {fitting[0]}x{fitting[1]}",
            )


class DCGANSpec(ConvolutionalAdversarialSpec):
    """DCGAN (Radford et al. 2015): convolutional generator and discriminator, for images."""

    kind: Literal["dcgan"] = "dcgan"

    def build_generator(self, signature: Signature) -> DCGANGenerator:
        """Noise (B, noise_size) -> images of `signature.input_shape`."""
        return DCGANGenerator(self.noise_size, signature.input_shape, width=self.width)

    def build_discriminator(self, signature: Signature) -> DCGANDiscriminator:
        """Images of `signature.input_shape` -> logits (B,)."""
        return DCGANDiscriminator(
            signature.input_shape, width=self.width, norm=self.discriminator_norm, spectral_norm=self.spectral_norm
        )


class ConditionalGANSpec(ConvolutionalAdversarialSpec):
    """Conditional GAN (Mirza & Osindero 2014): makes images of the class asked for, p(image | label)."""

    reads = reading(input=Image, target=Label)
    given = "target"
    kind: Literal["conditional_gan"] = "conditional_gan"
    embedding_size: PositiveInt = Field(50, description="numbers that stand for a label beside the generator's noise")

    def check(self, signature: Signature) -> None:
        """Raise UserError where the images do not fit, or there are no classes to choose from."""
        super().check(signature)
        if signature.num_outputs < 2:
            raise UserError(
                "model.kind",
                f"{self.kind} needs at least 2 classes, but the data has {signature.num_outputs}",
                "choose another data set, or set model.kind to dcgan",
            )

    def build_generator(self, signature: Signature) -> ConditionalGenerator:
        """Noise (B, noise_size) and labels (B,) below `num_outputs` -> images of `signature.input_shape`."""
        return ConditionalGenerator(
            self.noise_size,
            signature.num_outputs,
            signature.input_shape,
            embedding_size=self.embedding_size,
            width=self.width,
        )

    def build_discriminator(self, signature: Signature) -> ConditionalDiscriminator:
        """Images of `signature.input_shape` and labels (B,) below `num_outputs` -> logits (B,)."""
        return ConditionalDiscriminator(
            signature.num_outputs,
            signature.input_shape,
            width=self.width,
            norm=self.discriminator_norm,
            spectral_norm=self.spectral_norm,
        )
