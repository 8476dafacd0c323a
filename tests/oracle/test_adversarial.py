"""Adversarial nets against the usual implementations, closed forms, torch's losses, SciPy and the papers' numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from nn_models.adversarial import AdversarialSpec, ConditionalGANSpec, DCGANSpec, GANSpec, Maxout
from nn_models.adversarial_losses import AdversarialObjectiveSpec
from nn_models.pix2pix import NORMS, Pix2PixSpec
from nn_models.signature import Signature

FACES = Signature(input_shape=(3, 64, 64), num_outputs=1)
LN2 = math.log(2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(channels, size, *, condition_channels=None, num_outputs=1):
    condition = condition_channels and (condition_channels, size, size)
    return Signature(input_shape=(channels, size, size), condition_shape=condition, num_outputs=num_outputs)


def numbers_in(module):
    return sum(parameter.numel() for parameter in module.parameters())


# -- DCGAN ---------------------------------------------------------------------------------------------------------


def usual_dcgan_generator():
    """As in PyTorch's DCGAN tutorial and example (64 x 64, nz = 100, ngf = 64)."""
    layers = []
    for inputs, outputs, stride, padding in ((100, 512, 1, 0), (512, 256, 2, 1), (256, 128, 2, 1), (128, 64, 2, 1)):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh())


def usual_dcgan_discriminator():
    """As in PyTorch's DCGAN tutorial and example, up to its sigmoid (64 x 64, ndf = 64)."""
    layers = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for inputs in (64, 128, 256):
        layers += [nn.Conv2d(inputs, 2 * inputs, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * inputs)]
        layers += [nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 0, bias=False))


def give_weights(ours, theirs):
    """Both name their weights differently, but hold them in one order."""
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)), strict=True)


def test_dcgan_equals_the_usual_one_and_starts_as_the_paper_says():
    ours = DCGANSpec().build(FACES)
    theirs = usual_dcgan_generator(), usual_dcgan_discriminator()
    assert (numbers_in(ours.generator), numbers_in(ours.discriminator)) == (3_576_704, 2_765_568)

    noise, real = torch.randn(3, 100), torch.rand(3, 3, 64, 64) * 2 - 1
    give_weights(ours.generator, theirs[0])
    give_weights(ours.discriminator, theirs[1])
    assert torch.equal(ours.generator(noise), theirs[0](noise[:, :, None, None]))
    assert torch.equal(ours.discriminator(real), theirs[1](real).flatten())

    for layer in ours.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            check_normal(layer.weight, mean=0.0)
        if isinstance(layer, nn.BatchNorm2d):
            check_normal(layer.weight, mean=1.0)
            assert not layer.bias.any()


def check_normal(weight, *, mean):
    """N(mean, 0.02); 5 standard errors of each: a fixed seed, so this fails for good or never."""
    error = 0.02 / math.sqrt(weight.numel())
    assert weight.mean().item() == pytest.approx(mean, abs=5 * error)
    assert weight.std().item() == pytest.approx(0.02, abs=5 * error / math.sqrt(2))


def test_only_the_inner_layers_are_normalised():
    ours = DCGANSpec().build(FACES)
    normed = [[hasattr(layer, "norm") for layer in half.layers] for half in (ours.generator, ours.discriminator)]
    assert normed == [[True] * 4 + [False], [False] + [True] * 3]  # after D's layers comes its plain output
    slopes = {layer.negative_slope for layer in ours.discriminator.modules() if isinstance(layer, nn.LeakyReLU)}
    assert slopes == {0.2}


def test_conditional_gan_is_a_dcgan_with_wider_inputs():
    signature = images(3, 64, num_outputs=7)
    with torch.device("meta"):
        ours = ConditionalGANSpec(embedding_size=20).build(signature)
    # 20 more numbers into 512 4x4 kernels, a channel more into 64; one embedding each
    assert numbers_in(ours.generator) == 3_576_704 + 20 * 512 * 16 + 7 * 20
    assert numbers_in(ours.discriminator) == 2_765_568 + 64 * 16 + 7 * 64 * 64


# -- dense ---------------------------------------------------------------------------------------------------------


def test_maxout_takes_the_largest_of_its_linear_pieces():
    layer = Maxout(4, 3, pieces=5, spectral_norm=False).double()
    nn.init.normal_(layer.linear.bias)
    x = torch.randn(6, 4, dtype=torch.float64)
    weight = layer.linear.weight.detach().numpy().reshape(3, 5, 4)
    bias = layer.linear.bias.detach().numpy().reshape(3, 5)
    expected = (np.einsum("bd,kjd->bkj", x.numpy(), weight) + bias).max(2)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12)  # float64


def test_goodfellows_mnist_nets():
    """The sizes of the paper's MNIST run: github.com/goodfeli/adversarial, mnist.yaml."""
    spec = GANSpec(generator_hidden=(1200, 1200), discriminator_hidden=(240, 240), activation="maxout", dropout=0.5)
    with torch.device("meta"):
        ours = spec.build(images(1, 28))
    assert numbers_in(ours.generator) == 101 * 1200 + 1201 * 1200 + 1201 * 784
    assert numbers_in(ours.discriminator) == 785 * 1200 + 241 * 1200 + 241


# -- pix2pix -------------------------------------------------------------------------------------------------------


def test_pix2pix_has_the_parameters_that_the_authors_implementation_prints():
    """In millions, from issue 1152 of junyanz/pytorch-CycleGAN-and-pix2pix (one channel; 64 x 64 has six levels)."""
    printed = {}
    for size in (256, 64):
        with torch.device("meta"):
            ours = Pix2PixSpec().build(images(1, size, condition_channels=1))
        printed[size] = tuple(round(numbers_in(half) / 1e6, 3) for half in (ours.generator, ours.discriminator))
    assert printed == {256: (54.408, 2.765), 64: (29.238, 0.662)}


def test_pix2pix_of_the_paper():
    with torch.device("meta"):
        ours = Pix2PixSpec().build(images(3, 256, condition_channels=3))
        logits = ours.discriminator(torch.empty(2, 3, 256, 256), torch.empty(2, 3, 256, 256))
    assert logits.shape == (2, 1, 30, 30)
    # C64-C128-C256-C512-C512-C512-C512-C512 and CD512-CD512-CD512-C512-C256-C128-C64, Isola et al. 2016, section 6.1
    encoder = [layer.convolution.out_channels for layer in ours.generator.encoder]
    decoder = [layer.convolution.out_channels for layer in ours.generator.decoder]
    assert encoder == [64, 128, 256, 512, 512, 512, 512, 512]
    assert decoder == [512, 512, 512, 512, 256, 128, 64, 3]
    assert [hasattr(layer, "dropout") for layer in ours.generator.decoder] == [True] * 3 + [False] * 5
    assert [hasattr(layer, "norm") for layer in ours.generator.encoder] == [False] + [True] * 6 + [False]
    assert [hasattr(layer, "norm") for layer in ours.generator.decoder] == [True] * 7 + [False]
    assert [layer.convolution.out_channels for layer in ours.discriminator.layers] == [64, 128, 256, 512]
    assert (numbers_in(ours.generator), numbers_in(ours.discriminator)) == (54_413_955, 2_768_705)


def without_norms(module):
    """Normalisation lets every pixel touch every other: out of the way, to see what the kernels alone reach."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, tuple(NORMS.values())):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, nn.Identity())
    return module


@pytest.mark.parametrize(("patch_levels", "seen"), [(3, 70), (2, 34), (1, 16)])
def test_a_logit_sees_a_patch_of_both_images(patch_levels, seen):
    size = 2 * seen
    discriminator = Pix2PixSpec(patch_levels=patch_levels, width=2).build_discriminator(
        images(1, size, condition_channels=2)
    )
    discriminator = without_norms(discriminator).double()
    image = torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(1, 2, size, size, dtype=torch.float64, requires_grad=True)
    logits = discriminator(image, condition)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    for gradient in (image.grad, condition.grad):
        rows, columns = gradient[0].abs().sum(0).nonzero(as_tuple=True)
        for touched in (rows, columns):
            assert touched.max() - touched.min() + 1 == seen  # LeakyReLU has a slope everywhere, so none is missed


def test_each_level_of_the_unet_reaches_the_image():
    """Its lowest level sees the whole image; cut off the bottom, the skips still carry details to their place."""
    unet = without_norms(Pix2PixSpec(width=2, dropout=0).build_generator(images(1, 32, condition_channels=1))).double()
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)

    def seen():
        (gradient,) = torch.autograd.grad(unet(torch.empty(1, 0), x)[0, 0, 16, 16], x)
        rows = gradient[0, 0].abs().sum(1).nonzero()
        return (rows.max() - rows.min() + 1).item()

    reach = [seen()]
    for layer in unet.decoder[:-1]:  # from the bottom up: what a level makes of those below
        nn.init.zeros_(layer.convolution.weight)
        reach.append(seen())
    assert reach[0] == 32
    assert reach[-1] == 6  # one halving and one doubling: two 4x4 kernels that meet, (4 - 2) / 2 * 2 + 4
    assert reach == sorted(reach, reverse=True)


@pytest.mark.parametrize(("size", "levels"), [(16, None), (28, None), (28, 3), (28, 1)])
def test_the_unet_is_one_level_around_the_next(size, levels):
    """The nested form of the authors' implementation: a level maps x to [what it makes, x], the outermost without x."""
    unet = (
        Pix2PixSpec(width=2, levels=levels, dropout=0).build_generator(images(3, size, condition_channels=1)).double()
    )
    depth = len(unet.encoder)

    def level(number, x):
        inner = unet.encoder[number](x)
        if number < depth - 1:
            inner = level(number + 1, inner)
        made = unet.decoder[depth - 1 - number](inner)
        return torch.cat((made, x), dim=1) if number else made

    x = torch.randn(2, 1, size, size, dtype=torch.float64)
    assert torch.equal(unet(torch.empty(2, 0), x), level(0, x))


# -- spectral normalisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "signature"),
    [
        (GANSpec(spectral_norm=True), images(1, 8)),
        (GANSpec(spectral_norm=True, activation="maxout"), images(1, 8)),
        (DCGANSpec(spectral_norm=True, discriminator_norm="none", width=8), images(3, 16)),
        (ConditionalGANSpec(spectral_norm=True, width=8), images(1, 16, num_outputs=3)),
        (Pix2PixSpec(spectral_norm=True, width=8), images(1, 16, condition_channels=1)),
    ],
)
def test_spectral_norm_makes_the_largest_singular_value_one(spec, signature):
    discriminator = spec.build_discriminator(signature)
    layers = [layer for layer in discriminator.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        for _ in range(300):  # a power iteration each
            [layer.weight for layer in layers]
        discriminator.eval()
        largest = [torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() for layer in layers]
    assert len(layers) >= 3
    assert largest == pytest.approx([1] * len(layers), rel=1e-2)  # the iteration is slow where two are close
    generator = spec.build_generator(signature)
    assert not any("parametrizations" in name for name, _ in generator.named_parameters())


# -- losses --------------------------------------------------------------------------------------------------------


def build(loss, **fields):
    return AdversarialObjectiveSpec(loss=loss, **fields).build(FACES)


@pytest.mark.parametrize("loss", ["minimax", "non_saturating"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropies_equal_torchs(loss, smoothing):
    logits = 4 * torch.randn(50, dtype=torch.float64)
    objective = build(loss, label_smoothing=smoothing)

    def cross_entropy(target):
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="sum").item()

    # float64; the other form of the same sum
    assert objective.discriminator_real(logits).item() == pytest.approx(cross_entropy(1 - smoothing), rel=1e-12)
    assert objective.discriminator_fake(logits).item() == pytest.approx(cross_entropy(0), rel=1e-12)
    expected = -cross_entropy(0) if loss == "minimax" else cross_entropy(1)
    assert objective.generator(logits).item() == pytest.approx(expected, rel=1e-12)


def test_other_losses_equal_their_closed_forms():
    logits = np.array([-3.0, -0.5, 0.0, 0.25, 2.0])
    given = torch.tensor(logits)
    squares, hinge, wasserstein = build("least_squares", label_smoothing=0.1), build("hinge"), build("wasserstein")
    cases = [
        (squares.discriminator_real, ((logits - 0.9) ** 2).sum() / 2),  # Mao et al. 2017, eq. 9
        (squares.discriminator_fake, (logits**2).sum() / 2),
        (squares.generator, ((logits - 1) ** 2).sum() / 2),
        (hinge.discriminator_real, 4 + 1.5 + 1 + 0.75 + 0),  # max(0, 1 - l)
        (hinge.discriminator_fake, 0 + 0.5 + 1 + 1.25 + 3),  # max(0, 1 + l)
        (hinge.generator, 1.25),
        (wasserstein.discriminator_real, 1.25),
        (wasserstein.discriminator_fake, -1.25),
        (wasserstein.generator, 1.25),
    ]
    for loss, expected in cases:
        assert loss(given).item() == pytest.approx(expected, rel=1e-12)


def test_a_sure_discriminators_losses_are_exact_in_float32():
    """log D of a logit of 20: softplus(l) - l would be 0, and its slope a rounding error."""
    logits = torch.tensor([20.0], requires_grad=True)
    loss = build("non_saturating").discriminator_real(logits)
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(-20), rel=1e-6)  # float32
    assert logits.grad.item() == pytest.approx(-math.exp(-20), rel=1e-6)


def test_non_saturating_keeps_its_slope_where_the_discriminator_spots_each_fake():
    slopes = {}
    for loss in ("minimax", "non_saturating"):
        logits = torch.full((1,), -10.0, requires_grad=True)
        build(loss).generator(logits).backward()
        slopes[loss] = logits.grad.item()
    assert slopes["minimax"] == pytest.approx(-math.exp(-10), rel=1e-3)
    assert slopes["non_saturating"] == pytest.approx(-1, rel=1e-3)


# Distributions over three points, as rows: how often each point comes up.
REAL, FAKE = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 2])
P, Q = (torch.bincount(rows).double() / len(rows) for rows in (REAL, FAKE))


def value(objective, logits_of_points, real, fake):
    """V(D, G): minus the discriminator's mean loss."""
    real_loss = objective.discriminator_real(logits_of_points[real]) / len(real)
    return -(real_loss + objective.discriminator_fake(logits_of_points[fake]) / len(fake))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_best_discriminator_is_goodfellows(smoothing):
    objective = build("non_saturating", label_smoothing=smoothing)
    best = (1 - smoothing) * P / (P + Q)  # Salimans et al. 2016, section 3.4
    logits = torch.logit(best).requires_grad_()
    value(objective, logits, REAL, FAKE).backward()
    np.testing.assert_allclose(logits.grad, 0, atol=1e-15)  # float64; V is concave in the logits


def test_at_the_best_discriminator_the_value_is_the_jensen_shannon_divergence():
    best = torch.logit(P / (P + Q))
    expected = -2 * LN2 + 2 * jensenshannon(P, Q) ** 2  # SciPy's is the root; Goodfellow et al. 2014, eq. 6
    assert value(build("minimax"), best, REAL, FAKE).item() == pytest.approx(expected, rel=1e-12)


def test_where_fakes_are_as_good_as_the_data_the_value_is_minus_ln_4():
    best = torch.logit(P / (P + P))
    assert value(build("minimax"), best, REAL, REAL).item() == pytest.approx(-math.log(4), rel=1e-12)
    assert build("non_saturating").generator(best[REAL]).item() / 6 == pytest.approx(LN2, rel=1e-12)
    assert build("minimax").generator(best[REAL]).item() / 6 == pytest.approx(-LN2, rel=1e-12)
    half = torch.full((3,), 0.5, dtype=torch.float64)  # least squares: its D* is p / (p + q) itself, not a logit
    assert -value(build("least_squares"), half, REAL, REAL).item() == pytest.approx(1 / 4, rel=1e-12)
    assert build("least_squares").generator(half[REAL]).item() / 6 == pytest.approx(1 / 8, rel=1e-12)


def test_reconstruction_is_torchs_l1():
    fake, real = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    expected = 5 * F.l1_loss(fake, real).item()
    assert build("non_saturating").reconstruction(fake, real).item() == pytest.approx(expected, rel=1e-12)


# -- gradient penalty ----------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """l(x) = b x + x A x / 2, whose gradient is b + A x for a symmetric A; the condition adds c x."""

    def __init__(self, size):
        super().__init__()
        a = torch.randn(size, size, dtype=torch.float64)
        self.a, self.b = nn.Parameter(a + a.T), nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, x, condition=None):
        linear = self.b if condition is None else self.b + condition
        return (linear * x).sum(1) + torch.einsum("bi,ij,bj->b", x, self.a, x) / 2


@pytest.mark.parametrize("conditional", [False, True])
def test_penalty_equals_its_closed_form(conditional):
    discriminator = Quadratic(4)
    real, fake, condition = torch.randn(3, 6, 4, dtype=torch.float64)
    share = torch.rand(6, generator=torch.Generator().manual_seed(3)).double()[:, None].numpy()
    between = share * real.numpy() + (1 - share) * fake.numpy()
    gradient = discriminator.b.detach().numpy() + between @ discriminator.a.detach().numpy()
    gradient += condition.numpy() if conditional else 0
    expected = ((np.linalg.norm(gradient, axis=1) - 1) ** 2).sum()

    condition = condition if conditional else None
    generator = torch.Generator().manual_seed(3)
    penalty = build("wasserstein").penalty(discriminator, real, fake, condition, generator)
    assert penalty.item() == pytest.approx(expected, rel=1e-12)  # float64


def test_penalty_of_patches_is_that_of_their_mean():
    weight = torch.randn(4, dtype=torch.float64)

    class Patches(nn.Module):
        def forward(self, x, condition):
            return (x.flatten(1) * weight).view(-1, 1, 2, 2)  # a logit for each pixel

    real, fake = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    penalty = build("wasserstein").penalty(Patches(), real, fake, None, torch.Generator())
    assert penalty.item() == pytest.approx(3 * (weight.norm().item() / 4 - 1) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("spec", "signature"),
    [
        (DCGANSpec(width=1, discriminator_norm="layer", noise_size=2), images(1, 8)),
        (DCGANSpec(width=1, discriminator_norm="none", spectral_norm=True, noise_size=2), images(1, 8)),
        (GANSpec(discriminator_hidden=(3,), activation="maxout", pieces=2, dropout=0), images(1, 3)),
        (Pix2PixSpec(width=1), images(1, 8, condition_channels=1)),
    ],
)
def test_penaltys_gradient_equals_finite_differences(spec: AdversarialSpec, signature):
    discriminator = spec.build_discriminator(signature).double().eval()  # eval: no power iteration between two calls
    # weights of ordinary size: those of N(0, 0.02) make gradients, and so differences, of 1e-6
    weights = {name: torch.randn_like(weight).requires_grad_() for name, weight in discriminator.named_parameters()}
    real, fake = torch.randn(2, 3, *signature.input_shape, dtype=torch.float64)
    condition = torch.randn(3, *signature.condition_shape, dtype=torch.float64) if spec.given else None

    def penalty(*values):
        def run(images, condition):
            return functional_call(discriminator, dict(zip(weights, values, strict=True)), (images, condition))

        generator = torch.Generator().manual_seed(0)
        return build("wasserstein").penalty(run, real, fake, condition, generator)

    assert torch.autograd.gradcheck(penalty, tuple(weights.values()), fast_mode=True)


# -- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "discriminator_steps"),
    [("minimax", 1), ("non_saturating", 1), ("least_squares", 1), ("hinge", 1), ("wasserstein", 5)],
)
def test_each_loss_draws_the_generator_to_the_data(loss, discriminator_steps):
    """Signs and directions: real rows stand around (2, -1), the generator's around 0."""
    spec = GANSpec(noise_size=2, generator_hidden=(16,), discriminator_hidden=(32,), dropout=0)
    signature = Signature(input_shape=(2,), num_outputs=1)
    generator, discriminator = spec.build_generator(signature), spec.build_discriminator(signature)
    objective = build(loss)
    randomness = torch.Generator().manual_seed(0)
    adam_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.0, 0.9))  # Gulrajani et al. 2017; D leads
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=5e-3, betas=(0.0, 0.9))
    means = []
    for _step in range(300):
        for _ in range(discriminator_steps):
            real = torch.tensor([2.0, -1.0]) + torch.randn(64, 2, generator=randomness) / 2
            fake = generator(torch.randn(64, 2, generator=randomness), None)
            terms = objective.discriminator_real(discriminator(real, None))
            terms = terms + objective.discriminator_fake(discriminator(fake.detach(), None))
            if objective.gradient_penalty:
                penalty = objective.penalty(discriminator, real, fake, None, randomness)
                terms = terms + objective.gradient_penalty * penalty
            adam_d.zero_grad()
            (terms / 64).backward()
            adam_d.step()
        adam_g.zero_grad()
        (objective.generator(discriminator(fake, None)) / 64).backward()
        adam_g.step()
        means.append(fake.detach().mean(0))
    middle = torch.stack(means[150:]).median(0).values  # the halves circle around it, sometimes widely
    assert math.dist(middle, (2, -1)) < 1 < math.dist(means[0], (2, -1))
