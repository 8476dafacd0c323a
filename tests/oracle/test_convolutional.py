"""Convolutional nets against SciPy's correlation and torchvision's AlexNet."""

import numpy as np
import pytest
import torch
import torchvision
from scipy.signal import correlate2d
from torch import nn
from torch.nn import functional as F

from nn_models.convolutional import AlexNet, AlexNetSpec, CNNSpec
from nn_models.errors import UserError
from nn_models.signature import Signature

IMAGENET = Signature(input_shape=(3, 224, 224), num_outputs=1000)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def correlate(image, layer):
    """One convolution with "same" padding as sums of SciPy's: (C, H, W) -> (K, H, W)."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.stack(
        [
            sum(correlate2d(plane, kernel, mode="same") for plane, kernel in zip(image, kernels, strict=True)) + offset
            for kernels, offset in zip(weight, bias, strict=True)
        ]
    )


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("pooling", "reduce"), [("max", np.max), ("average", np.mean)])
def test_cnn_equals_scipy(kernel_size, pooling, reduce):
    spec = CNNSpec(
        channels=(3, 4), convolutions_per_block=2, kernel_size=kernel_size, pool=2, pooling=pooling, hidden=(5,)
    )
    model = spec.build(Signature(input_shape=(2, 9, 8), num_outputs=3)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # biases too, which start as zeros
    x = torch.randn(2, 9, 8, dtype=torch.float64)

    h = x.numpy()
    for block in model.blocks:
        for layers in list(block)[:2]:
            h = np.maximum(0, correlate(h, layers.convolution))
        height, width = h.shape[1] // 2, h.shape[2] // 2
        h = reduce(h[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2), axis=(2, 4))
    dense, output = model.dense.hidden[0].linear, model.dense.output
    h = np.maximum(0, dense.weight.detach().numpy() @ h.ravel() + dense.bias.detach().numpy())
    expected = output.weight.detach().numpy() @ h + output.bias.detach().numpy()

    np.testing.assert_allclose(model(x[None])[0].detach().numpy(), expected, rtol=1e-10)  # float64, another sum order


def test_cnn_gradients_equal_finite_differences():
    spec = CNNSpec(channels=(2,), activation="tanh", pooling="average", batch_norm=True, hidden=(3,))
    model = spec.build(Signature(input_shape=(1, 4, 4), num_outputs=2)).double()
    assert torch.autograd.gradcheck(model, torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True))


def test_cnn_drops_before_each_dense_layer():
    model = CNNSpec(dropout=0.5).build(Signature(input_shape=(1, 8, 8), num_outputs=3))
    x = torch.randn(4, 1, 8, 8)
    dense, output = model.dense.hidden[0].linear, model.dense.output
    torch.manual_seed(1)
    h = F.dropout(model.blocks(x), 0.5).flatten(1)
    h = F.dropout(F.relu(F.linear(h, dense.weight, dense.bias)), 0.5)
    expected = F.linear(h, output.weight, output.bias)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


def test_cnn_default_parameters():
    model = CNNSpec().build(Signature(input_shape=(1, 28, 28), num_outputs=10))
    # 3x3 kernels and biases, then 7x7 images of 64 channels into 128 units, then 10 classes
    expected = (9 + 1) * 32 + (9 * 32 + 1) * 64 + (64 * 49 + 1) * 128 + 129 * 10
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 421_642


@pytest.fixture(scope="module")
def alexnets():
    """Ours and torchvision's, each built from seed 0."""
    torch.manual_seed(0)
    ours = AlexNetSpec().build(IMAGENET).eval()
    torch.manual_seed(0)
    return ours, torchvision.models.alexnet(weights=None).eval()


def test_alexnet_starts_from_torchvisions_weights(alexnets):
    ours, theirs = (model.state_dict() for model in alexnets)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(weight.numel() for weight in ours.values()) == 61_100_840


@pytest.mark.parametrize("size", [224, 63, 100])
def test_alexnet_gives_torchvisions_logits(alexnets, size):
    ours, theirs = alexnets
    x = torch.randn(2, 3, size, size + 5)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_alexnet_exchanges_weights_with_torchvision_both_ways():
    with torch.device("meta"):  # drawing 57 million weights that are then replaced takes a second
        ours = AlexNetSpec().build(Signature(input_shape=(3, 63, 63), num_outputs=7)).eval()
        theirs = torchvision.models.alexnet(weights=None, num_classes=7).eval()
    weights = {name: torch.randn(weight.shape) / 50 for name, weight in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 3, 63, 63)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_small_alexnet_is_alexnet_with_fewer_parameters():
    signature = Signature(input_shape=(3, 32, 32), num_outputs=10)
    with torch.device("meta"):
        small = AlexNetSpec(variant="small").build(signature)
        large = AlexNet(3, 10, dropout=0.5)
    kinds = [
        [type(layer) for layer in model.features] + [type(layer) for layer in model.classifier]
        for model in (small, large)
    ]
    assert kinds[0] == kinds[1]
    channels = [
        [layer.out_channels for layer in model.features if isinstance(layer, nn.Conv2d)] for model in (small, large)
    ]
    assert channels[0] == channels[1]
    assert sum(parameter.numel() for parameter in small.parameters()) == 3_044_170


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # the dense layer after nothing
@pytest.mark.parametrize(
    "spec",
    [
        AlexNetSpec(),
        AlexNetSpec(variant="small"),
        CNNSpec(channels=(1, 1, 1)),
        CNNSpec(channels=(1, 1), pool=4, kernel_size=5, pooling="average"),
        CNNSpec(channels=(1, 1), pool=1),
    ],
)
def test_an_image_is_refused_exactly_when_torch_cannot_pool_it(spec):
    refused, failed = set(), set()
    for size in [*range(1, 20), *range(58, 68)]:
        for height, width in ((size, 70), (70, size)):
            signature = Signature(input_shape=(1, height, width), num_outputs=2)
            try:
                spec.check(signature)
            except UserError:
                refused.add((height, width))
            try:
                with torch.device("meta"):
                    spec.build(signature)(torch.empty(1, 1, height, width))
            except RuntimeError:
                failed.add((height, width))
    assert refused == failed


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (
            AlexNetSpec(),
            28,
            "model.variant: imagenet needs images of at least 63x63, but the data has 28x28; "
            "set model.variant to small",
        ),
        (
            AlexNetSpec(variant="small"),
            8,
            "model.variant: small needs images of at least 15x15, but the data has 8x8; "
            "set model.kind to cnn, or enlarge the images",
        ),
        (
            CNNSpec(channels=(8, 8, 8, 8)),
            8,
            "model.channels: [8, 8, 8, 8] makes 4 poolings by 2, which need images of at "
            "least 16x16, but the data has 8x8; shorten model.channels to 3 or lower model.pool",
        ),
        (
            CNNSpec(pool=9),
            8,
            "model.channels: [32, 64] makes 2 poolings by 9, which need images of at least 81x81, but "
            "the data has 8x8; lower model.pool",
        ),
    ],
)
def test_a_refusal_names_path_value_and_fix(spec, size, message):
    with pytest.raises(UserError) as refusal:
        spec.check(Signature(input_shape=(1, size, size), num_outputs=10))
    assert str(refusal.value) == message
