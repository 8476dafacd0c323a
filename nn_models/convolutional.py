"""Convolutional nets: a plain one of any depth, and AlexNet.

Shapes: B rows of the batch, C channels, H and W height and width, K outputs.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn

from nn_models.activations import ACTIVATIONS, ActivationName, initialise
from nn_models.columns import Image
from nn_models.errors import UserError
from nn_models.feedforward import MLP
from nn_models.model import Batching, ModelSpec, reading
from nn_models.signature import Signature
from nn_models.spec import invalid

# Activations of one trial after the first convolution up to which fused CNNs were quicker.
MOST_ACTIVATION_BYTES = 4 << 20

POOLINGS: dict[str, type[nn.MaxPool2d] | type[nn.AvgPool2d]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


class CNN(nn.Module):
    """Blocks of convolution -> activation -> pooling, then dense layers (LeCun et al. 1998).

    A convolution with kernels w of size n x n and padding p = (n - 1) / 2 keeps the image's size ("same"):

        y[k, i, j] = b[k] + sum_c sum_u sum_v w[k, c, u, v] x[c, i + u - p, j + v - p]        u, v = 0 ... n - 1

    (a cross-correlation, with zeros outside the image). A pooling takes the maximum or the average of each
    pool x pool square, so it divides height and width by `pool`, dropping a remainder at the edge.
    Several convolutions a block are Simonyan & Zisserman 2015; normalisation is Ioffe & Szegedy 2015 and brings
    its own bias, so b is then left out. Dropout stands before each dense layer, as in AlexNet.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        *,
        channels: Sequence[int],
        convolutions_per_block: int,
        kernel_size: int,
        pool: int,
        pooling: str,
        activation: ActivationName,
        batch_norm: bool,
        hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        num_channels, height, width = input_shape
        self.blocks = nn.Sequential()
        for block_channels in channels:
            block = nn.Sequential()
            for _ in range(convolutions_per_block):
                convolution = nn.Conv2d(
                    num_channels, block_channels, kernel_size, padding=kernel_size // 2, bias=not batch_norm
                )
                initialise(convolution, activation=activation)
                layers: OrderedDict[str, nn.Module] = OrderedDict(convolution=convolution)
                if batch_norm:
                    layers["norm"] = nn.BatchNorm2d(block_channels)
                layers["activation"] = ACTIVATIONS[activation]()
                block.append(nn.Sequential(layers))
                num_channels = block_channels
            if pool > 1:
                block.append(POOLINGS[pooling](pool))
            self.blocks.append(block)
            height, width = height // pool, width // pool
        self.dropout = nn.Dropout(dropout)
        self.dense = MLP(
            num_channels * height * width,
            num_outputs,
            hidden=hidden,
            activation=activation,
            dropout=dropout,
            batch_norm=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.dense(self.dropout(self.blocks(x)))


class AlexNet(nn.Module):
    """AlexNet as it was trained on ImageNet: five convolutions, three dense layers, 61,100,840 parameters.

    Krizhevsky, Sutskever & Hinton 2012, in the one-tower form of Krizhevsky 2014 ("One weird trick for
    parallelizing convolutional neural networks", arXiv:1404.5997): 64, 192, 384, 256 and 256 kernels, no local
    response normalisation. Sizes below are for the paper's 224 x 224 images; the average pooling to 6 x 6 lets
    other sizes in. Parameter names, shapes and initial weights are torchvision's, so its weights load here.
    """

    min_size = 63  # pixels a side: below, the third pooling has nothing left to pool

    def __init__(self, num_channels: int, num_outputs: int, *, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(num_channels, 64, kernel_size=11, stride=4, padding=2),  # 55 x 55
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 27 x 27; overlapping pooling, 2012, section 3.4
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 13 x 13
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # 6 x 6
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),  # 2012, section 4.2
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W at least 63, -> (B, K)."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class SmallAlexNet(nn.Module):
    """AlexNet for images of about 28 to 64 pixels: the same five convolutions and three dense layers.

    The usual adaptation to CIFAR-10 (W. Yang, github.com/bearpaw/pytorch-classification, models/cifar/alexnet.py,
    and its many variants): AlexNet's first layers alone would shrink such an image to a few pixels. Here

    - the first convolution is 3 x 3 with stride 2 (not 11 x 11 with stride 4), the second 3 x 3 (not 5 x 5);
    - the poolings are 2 x 2 (not 3 x 3, overlapping);
    - the two hidden dense layers have 512 units (not 4096: they were 54 of 61 million parameters);
    - weights start as He et al. 2015 draw them, so that eight layers train without normalisation.

    Sizes below are for 32 x 32 images.
    """

    min_size = 15  # pixels a side: below, the third pooling has nothing left to pool

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, dropout: float) -> None:
        super().__init__()
        num_channels, height, width = input_shape
        self.features = nn.Sequential(
            nn.Conv2d(num_channels, 64, kernel_size=3, stride=2, padding=1),  # 16 x 16
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # 8 x 8
            nn.Conv2d(64, 192, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # 4 x 4
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # 2 x 2
        )
        height, width = ((size + 1) // 2 // 8 for size in (height, width))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * height * width, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_outputs),
        )
        output = self.classifier[-1]
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                initialise(layer, activation=None if layer is output else "relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), the H and W it was built for, -> (B, K)."""
        return self.classifier(self.features(x).flatten(1))


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise invalid(f"must be odd, to pad both sides alike, not {size}", f"set {size - 1} or {size + 1}")
    return size


class CNNSpec(ModelSpec):
    """Plain convolutional net: blocks of convolution, activation and pooling, then dense layers."""

    reads = reading(input=Image)
    kind: Literal["cnn"] = "cnn"
    channels: tuple[PositiveInt, ...] = Field((32, 64), min_length=1, description="kernels of each block")
    convolutions_per_block: int = Field(1, gt=0, description="convolutions before each pooling")
    kernel_size: Annotated[int, AfterValidator(_odd)] = Field(
        3, gt=0, description="height and width of a kernel, odd; images are padded to keep their size"
    )
    pool: int = Field(2, gt=0, description="each block's pooling divides height and width by this; 1 for no pooling")
    pooling: Literal["max", "average"] = Field("max", description="what a pooling takes of each square")
    activation: ActivationName = Field("relu", description="what follows each convolution and hidden layer")
    batch_norm: bool = Field(False, description="normalise each convolution over the batch before its activation")
    hidden: tuple[PositiveInt, ...] = Field((128,), description="units of each hidden dense layer; [] for none")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each dense layer's inputs dropped in training")

    def check(self, signature: Signature) -> None:
        """Raise UserError where the data are no images, or images too small for all the poolings."""
        super().check(signature)
        _, height, width = signature.input_shape
        min_size = self.pool ** len(self.channels)
        if min(height, width) < min_size:
            num_fitting = next(n for n in range(len(self.channels)) if self.pool ** (n + 1) > min(height, width))
            fix = f"shorten model.channels to {num_fitting} or lower model.pool" if num_fitting else "lower model.pool"
            raise UserError(
                "model.channels",
                f"{list(self.channels)} makes {len(self.channels)} poolings by {self.pool}, which need images of at "
                f"least {min_size}x{min_size}, but the data has {height}x{width}",
                fix,
            )

    def build(self, signature: Signature) -> CNN:
        """The module: images of `signature.input_shape` -> (B, num_outputs)."""
        return CNN(signature.input_shape, signature.num_outputs, **self.settings())

    @property
    def batches(self) -> Batching:
        """See ModelSpec."""
        return "wide"

    def quicker_fused(self, signature: Signature, num_rows: int) -> bool:
        """See ModelSpec. While the activations of all trials fit a cache."""
        _, height, width = signature.input_shape
        return 4 * num_rows * self.channels[0] * height * width <= MOST_ACTIVATION_BYTES


class AlexNetSpec(ModelSpec):
    """AlexNet (Krizhevsky et al. 2012): five convolutions and three dense layers."""

    reads = reading(input=Image)
    kind: Literal["alexnet"] = "alexnet"
    variant: Literal["imagenet", "small"] = Field(
        "imagenet",
        description=f"imagenet: torchvision's, for 224x224 images, at least {AlexNet.min_size}x{AlexNet.min_size}; "
        f"small: lighter, for about 28x28 to 64x64, at least {SmallAlexNet.min_size}x{SmallAlexNet.min_size}",
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="share of the hidden dense layers' inputs dropped in training")

    def check(self, signature: Signature) -> None:
        """Raise UserError where the data are no images, or images too small for the variant."""
        super().check(signature)
        _, height, width = signature.input_shape
        min_size = AlexNet.min_size if self.variant == "imagenet" else SmallAlexNet.min_size
        if min(height, width) < min_size:
            small_fits = min(height, width) >= SmallAlexNet.min_size
            fix = "set model.variant to small" if small_fits else "set model.kind to cnn, or enlarge the images"
            raise UserError(
                "model.variant",
                f"{self.variant} needs images of at least {min_size}x{min_size}, but the data has {height}x{width}",
                fix,
            )

    def build(self, signature: Signature) -> AlexNet | SmallAlexNet:
        """The module: images of `signature.input_shape` -> (B, num_outputs)."""
        if self.variant == "imagenet":
            return AlexNet(signature.input_shape[0], signature.num_outputs, dropout=self.dropout)
        return SmallAlexNet(signature.input_shape, signature.num_outputs, dropout=self.dropout)

    @property
    def batches(self) -> Batching:
        """See ModelSpec."""
        return "wide"
