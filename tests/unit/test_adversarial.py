"""Adversarial nets: shapes and refusals of every size, how halves are called, sums of losses."""

import pytest
import torch
from torch import nn

from nn_models import zoo
from nn_models.adversarial import ConditionalGANSpec, DCGANSpec, GANSpec
from nn_models.adversarial_losses import GAMES, METRICS, AdversarialObjectiveSpec
from nn_models.classification import ClassificationSpec
from nn_models.columns import Image
from nn_models.errors import UserError
from nn_models.feedforward import MLPSpec
from nn_models.pix2pix import Pix2PixSpec
from nn_models.signature import Signature
from nn_models.spec import override, validate
from nn_models.zoo import AnyObjectiveSpec

digits = Signature(input_shape=(1, 8, 8), num_outputs=10)
losses = pytest.mark.parametrize("loss", GAMES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(height, width=None, *, channels=1, condition_shape=None, num_outputs=2):
    return Signature(
        input_shape=(channels, height, width or height), condition_shape=condition_shape, num_outputs=num_outputs
    )


def pairs(height, width=None):
    return images(height, width, condition_shape=(1, height, width or height))


def condition_of(spec, signature):
    """Four rows of what the halves are given; labels, which are not looked at, where that is nothing."""
    if spec.given is not None and isinstance(signature[spec.given], Image):
        return torch.randn(4, *signature[spec.given].row_shape)
    return torch.arange(4)


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "base", "channels"),
    [(8, 2, [128, 64]), (16, 4, [128, 64]), (28, 7, [128, 64]), (32, 4, [256, 128, 64]), (64, 4, [512, 256, 128, 64])],
)
def test_dcgans_layers_at_each_size(size, base, channels):
    generator = DCGANSpec().build_generator(images(size, channels=3))
    discriminator = DCGANSpec().build_discriminator(images(size, channels=3))
    assert [layer.convolution.out_channels for layer in generator.layers] == [*channels, 3]
    assert [layer.convolution.out_channels for layer in discriminator.layers] == channels[::-1]
    assert generator.layers[0](torch.randn(2, 100, 1, 1)).shape == (2, channels[0], base, base)
    made = generator(torch.randn(2, 100))
    assert made.shape == (2, 3, size, size)
    assert made.abs().max() <= 1
    assert discriminator(made).shape == (2,)


def test_channels_are_at_most_eight_times_the_width():
    with torch.device("meta"):
        halves = DCGANSpec(width=2).build(images(256))
    assert [layer.convolution.out_channels for layer in halves.generator.layers] == [16, 16, 16, 8, 4, 2, 1]
    assert [layer.convolution.out_channels for layer in halves.discriminator.layers] == [2, 4, 8, 16, 16, 16]


SIZES = [(side, side) for side in [*range(4, 35), 48, 63, 64, 96, 100]] + [(8, 30), (16, 24), (20, 8), (28, 56)]


def test_dcgan_refuses_exactly_the_sizes_that_it_would_not_return():
    """And the size that a refusal proposes fits."""
    with torch.device("meta"):
        for height, width in SIZES:
            signature = images(height, width)
            try:
                DCGANSpec().check(signature)
                refused = False
            except UserError as refusal:
                refused = True
                proposed = [int(side) for side in str(refusal).split()[-1].split("x")]
                DCGANSpec().check(images(*proposed))
            halves = DCGANSpec(width=1).build(signature)
            made = halves(torch.empty(2, 100))
            returned = made.shape[2:] == (height, width) and min(height, width) >= 8
            assert refused == (not returned), (height, width)
            if not refused:
                assert halves.discriminator(made).shape == (2,)


@pytest.mark.parametrize(
    ("size", "levels", "patches"), [(8, 3, 2), (28, 4, 12), (32, 5, 14), (64, 6, 14), (128, 7, 14)]
)
def test_pix2pix_at_each_size(size, levels, patches):
    spec = Pix2PixSpec(width=2)
    generator, discriminator = spec.build_generator(pairs(size)), spec.build_discriminator(pairs(size))
    assert len(generator.encoder) == len(generator.decoder) == levels
    given = torch.rand(2, 1, size, size) * 2 - 1
    made = generator(torch.empty(2, spec.noise_size), given)
    assert made.shape == given.shape
    assert made.abs().max() <= 1
    assert discriminator(made, given).shape == (2, 1, patches, patches)
    x = given
    for _, layer in zip(range(levels), generator.encoder, strict=True):
        x = layer(x)
    assert x.shape[2:] == (1, 1)  # the bottom is one pixel


@pytest.mark.parametrize("fields", [{}, {"levels": 3}, {"patch_levels": 1}, {"patch_levels": 2}, {"norm": "batch"}])
def test_pix2pix_refuses_exactly_the_sizes_that_it_cannot_take(fields):
    spec, refused, failed = Pix2PixSpec(width=1, **fields), set(), set()
    for height, width in [*SIZES, (5, 20), (20, 6), (11, 70)]:
        try:
            spec.check(pairs(height, width))
        except UserError:
            refused.add((height, width))
        try:
            halves = spec.build(pairs(height, width))
            given = torch.randn(1, 1, height, width)
            made = halves(torch.empty(1, 0), given)
            assert made.shape == given.shape
            halves.discriminator(made, given)
        except (RuntimeError, ValueError):  # nothing left to convolve, or to normalise
            failed.add((height, width))
    assert refused == failed


# -- how halves are called -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "signature"),
    [
        (GANSpec(), Signature(input_shape=(5,), num_outputs=3)),
        (GANSpec(), digits),
        (DCGANSpec(width=4), digits),
        (ConditionalGANSpec(width=4), digits),
        (Pix2PixSpec(width=4), pairs(8)),
    ],
)
def test_all_kinds_are_called_alike(spec, signature):
    """As training does it, without a word about the kind."""
    spec.check(signature)
    source = torch.randn(4, spec.noise_size)
    condition = condition_of(spec, signature)
    made = spec.build_generator(signature)(source, condition)
    logits = spec.build_discriminator(signature)(made, condition)
    assert made.shape == (4, *signature.input_shape)
    assert logits.shape[0] == 4
    for loss in GAMES:
        objective = AdversarialObjectiveSpec(loss=loss).build(digits)
        assert objective.discriminator_real(logits).shape == ()
        assert objective.generator(logits).shape == ()


@pytest.mark.parametrize("spec", [GANSpec(), DCGANSpec(width=4)])
def test_the_unconditional_do_not_look_at_the_condition(spec):
    halves = spec.build(digits).eval()
    source, labels = torch.randn(3, 100), torch.arange(3)
    made = halves.generator(source, None)
    assert torch.equal(made, halves.generator(source, labels))
    assert torch.equal(halves.discriminator(made, None), halves.discriminator(made, labels))


def test_features_have_no_bounds_and_images_have():
    spec = GANSpec(generator_hidden=())
    source = 100 * torch.randn(50, spec.noise_size)
    features = Signature(input_shape=(64,), num_outputs=1)
    assert spec.build_generator(features)(source).abs().max() > 1
    assert spec.build_generator(digits)(source).abs().max() <= 1


def test_the_label_changes_what_is_made_and_what_is_said_of_it():
    halves = ConditionalGANSpec(width=8).build(digits).eval()
    source = torch.randn(1, 100).expand(10, -1)
    labels = torch.arange(10)
    with torch.no_grad():
        made = halves(source, labels)
        assert len(made.flatten(1).unique(dim=0)) == 10  # ten labels, ten images of one noise
        assert torch.equal(halves(source, labels), made)
        same = made[:1].expand(10, -1, -1, -1)
        assert len(halves.discriminator(same, labels).unique()) == 10


def test_the_condition_changes_what_pix2pix_makes_and_what_is_said_of_it():
    halves = Pix2PixSpec(width=4, dropout=0).build(pairs(16))
    one, other = torch.randn(2, 1, 1, 16, 16)
    nothing = torch.empty(1, 0)
    assert not torch.equal(halves(nothing, one), halves(nothing, other))
    made = halves(nothing, one)
    assert not torch.equal(halves.discriminator(made, one), halves.discriminator(made, other))
    assert not torch.equal(halves.discriminator(one, other), halves.discriminator(other, one))


def test_dropout_is_pix2pixs_noise_in_evaluation_too():
    given, nothing = torch.randn(1, 1, 16, 16), torch.empty(1, 0)
    noisy = Pix2PixSpec(width=4).build_generator(pairs(16)).eval()
    still = Pix2PixSpec(width=4, dropout=0).build_generator(pairs(16)).eval()
    assert not torch.equal(noisy(nothing, given), noisy(nothing, given))
    assert torch.equal(still(nothing, given), still(nothing, given))


def test_instance_norm_makes_rows_independent_of_their_batch():
    """So any number of workers computes the same, and batches of one are the paper's."""
    halves = Pix2PixSpec(width=4, dropout=0).build(pairs(16))
    given = torch.randn(3, 1, 16, 16)
    together = halves(torch.empty(3, 0), given)
    alone = torch.cat([halves(torch.empty(1, 0), row[None]) for row in given])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # float32, kernels chosen by batch size


@pytest.mark.parametrize(
    ("spec", "signature", "mixes"),
    [
        (GANSpec(), digits, False),
        (DCGANSpec(width=2), digits, True),
        (DCGANSpec(width=2, discriminator_norm="layer"), digits, False),
        (ConditionalGANSpec(width=2, discriminator_norm="none"), digits, False),
        (Pix2PixSpec(width=2, norm="batch"), pairs(8), True),
        (Pix2PixSpec(width=2), pairs(8), False),
    ],
)
def test_a_spec_knows_whether_its_discriminator_mixes_rows(spec, signature, mixes):
    discriminator = spec.build_discriminator(signature)
    rows = torch.randn(4, *signature.input_shape, requires_grad=True)
    condition = condition_of(spec, signature)
    discriminator(rows, condition)[0].sum().backward()
    assert rows.grad[1:].any() == mixes
    assert spec.discriminator_mixes_rows == mixes


# -- losses --------------------------------------------------------------------------------------------------------


@losses
def test_losses_are_sums_over_rows_and_means_over_patches(loss):
    objective = AdversarialObjectiveSpec(loss=loss).build(digits)
    logits = torch.randn(6, 1, 3, 4, dtype=torch.float64)
    for term in (objective.discriminator_real, objective.discriminator_fake, objective.generator):
        rows = torch.stack([term(logit) for logit in logits.flatten(1).T]).mean(0)  # each patch by itself, (B,) logits
        assert term(logits).item() == pytest.approx(rows.item(), rel=1e-12)
        parts = sum(term(part) for part in logits.split([1, 3, 2]))
        assert parts.item() == pytest.approx(term(logits).item(), rel=1e-12)


@losses
def test_losses_of_half_precision_logits_are_float32(loss):
    objective = AdversarialObjectiveSpec(loss=loss).build(digits)
    logits = torch.randn(5).bfloat16()
    for term in (objective.discriminator_real, objective.discriminator_fake, objective.generator):
        assert term(logits).dtype == torch.float32
    assert objective.reconstruction(logits, logits).dtype == torch.float32


def test_smoothing_touches_the_real_side_only():
    plain, smooth = (AdversarialObjectiveSpec(label_smoothing=s).build(digits) for s in (0, 0.1))
    logits = torch.randn(5)
    assert not torch.equal(plain.discriminator_real(logits), smooth.discriminator_real(logits))
    assert torch.equal(plain.discriminator_fake(logits), smooth.discriminator_fake(logits))
    assert torch.equal(plain.generator(logits), smooth.generator(logits))


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, 0),
        ({"loss": "wasserstein"}, 10),
        ({"loss": "wasserstein", "gradient_penalty": 0}, 0),
        ({"loss": "hinge", "gradient_penalty": 3}, 3),
    ],
)
def test_the_penaltys_weight(fields, weight):
    objective = validate(AnyObjectiveSpec, {"kind": "adversarial", **fields})
    assert objective.build(digits).gradient_penalty == weight
    assert validate(AnyObjectiveSpec, objective.model_dump(mode="json")) == objective


class Flat(nn.Module):
    """A discriminator that says the same of everything."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images, condition):
        return (images * self.weight).flatten(1).sum(1)


def test_penalty_of_a_flat_discriminator_is_one_a_row_with_a_finite_slope():
    discriminator, objective = Flat(), AdversarialObjectiveSpec().build(digits)
    real, fake = torch.randn(2, 3, 1, 2, 2)
    penalty = objective.penalty(discriminator, real, fake, None, torch.Generator())
    assert penalty.item() == 3
    penalty.backward()
    assert discriminator.weight.grad.isfinite().all()


def test_penalty_leaves_generator_and_data_alone_and_is_repeatable():
    discriminator, objective = GANSpec(dropout=0).build_discriminator(digits), AdversarialObjectiveSpec().build(digits)
    real, fake = torch.randn(2, 3, 1, 8, 8)
    fake.requires_grad_()
    state = torch.get_rng_state()
    first, second, other = (
        objective.penalty(discriminator, real, fake, None, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())  # only the given generator is drawn from
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    first.backward()
    assert fake.grad is None
    assert discriminator.hidden[0][0][0].weight.grad.any()


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "signature", "message"),
    [
        (
            {"kind": "dcgan"},
            images(30),
            "model.kind: dcgan halves such images 2 times, so both sides must be multiples of 4, at least 8, "
            "but the data has 30x30; resize the images to 32x32",
        ),
        (
            {"kind": "conditional_gan"},
            images(63, 70),
            "model.kind: conditional_gan halves such images 3 times, so both sides must be multiples of 8, "
            "at least 16, but the data has 63x70; resize the images to 64x72",
        ),
        (
            {"kind": "conditional_gan"},
            images(8, num_outputs=1),
            "model.kind: conditional_gan needs at least 2 classes, but the data has 1; "
            "choose another data set, or set model.kind to dcgan",
        ),
        (
            {"kind": "pix2pix"},
            images(28),
            "model.kind: pix2pix turns one image into another, but the data has only one image a row; "
            "choose a data set of image pairs, or set model.kind to dcgan",
        ),
        (
            {"kind": "pix2pix"},
            images(28, condition_shape=(1, 28, 32)),
            "model.kind: pix2pix needs both images of a pair in one size, but the data has shapes (1, 28, 32) and "
            "(1, 28, 28); resize one of them",
        ),
        (
            {"kind": "pix2pix"},
            pairs(5, 20),
            "model.kind: pix2pix needs images of at least 6x6, but the data has 5x20; enlarge the images",
        ),
        (
            {"kind": "pix2pix", "levels": 5},
            pairs(28),
            "model.levels: 5 halvings need images of at least 32x32, but the data has 28x28; "
            "lower model.levels to 4 or leave it out",
        ),
        (
            {"kind": "pix2pix", "patch_levels": 4},
            pairs(28),
            "model.patch_levels: 4 halvings need images of at least 48x48, but the data has 28x28; "
            "lower model.patch_levels to 3 or leave it out",
        ),
        ({"kind": "pix2pix", "noise_size": 10}, pairs(28), "model.noise_size: must be 0, not 10"),
        ({"kind": "gan", "noise_size": 0}, digits, "model.noise_size: must be greater than 0, not 0"),
        ({"kind": "gan", "spectral_norm": 1.5}, digits, "model.spectral_norm: must be a valid boolean"),
        ({"kind": "dcgan", "discriminator_norm": "instance"}, digits, "model.discriminator_norm: must be 'batch', "),
    ],
)
def test_a_refusal_names_path_value_and_fix(model, signature, message):
    with pytest.raises(UserError) as refusal:
        zoo.build(model, signature)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss": "wasserstein", "label_smoothing": 0.1},
            "objective.label_smoothing: the wasserstein loss has no labels to smooth; "
            "set it to 0 or choose another loss",
        ),
        ({"loss": "wgan"}, "objective.loss: must be 'minimax', 'non_saturating', 'least_squares', 'hinge' or "),
        ({"discriminator_steps": 0}, "objective.discriminator_steps: must be greater than 0, not 0"),
        ({"l1_wieght": 1}, "objective.l1_wieght: unknown field; did you mean l1_weight?"),
    ],
)
def test_a_wrong_objective_is_refused(fields, message):
    with pytest.raises(UserError) as refusal:
        validate(AnyObjectiveSpec, {"kind": "adversarial", **fields}, prefix="objective")
    assert str(refusal.value).startswith(message)


def test_an_override_is_checked_against_the_loss():
    smooth = AdversarialObjectiveSpec(label_smoothing=0.1)
    with pytest.raises(UserError, match="no labels to smooth"):
        override(smooth, {"loss": "hinge"})


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (
            AdversarialObjectiveSpec(),
            MLPSpec(),
            "objective.kind: adversarial trains a generator and a discriminator, but mlp is one net; "
            "set model.kind to gan, dcgan, conditional_gan or pix2pix, or choose another objective",
        ),
        (
            ClassificationSpec(),
            GANSpec(),
            "objective.kind: classification trains one net, but gan is a generator and a discriminator; "
            "set objective.kind to adversarial",
        ),
        (
            AdversarialObjectiveSpec(l1_weight=100),
            DCGANSpec(),
            "objective.l1_weight: 100 draws each image to the true one of its pair, but dcgan makes images without "
            "pairs; set it to 0 or set model.kind to pix2pix",
        ),
        (
            AdversarialObjectiveSpec(loss="wasserstein"),
            DCGANSpec(),
            "objective.gradient_penalty: 10 needs a discriminator that judges each row by itself, but "
            "model.discriminator_norm is batch; set model.discriminator_norm to layer, "
            "or objective.gradient_penalty to 0",
        ),
        (
            AdversarialObjectiveSpec(gradient_penalty=1),
            Pix2PixSpec(norm="batch"),
            "objective.gradient_penalty: 1 needs a discriminator that judges each row by itself, but "
            "model.norm is batch; set model.norm to instance, or objective.gradient_penalty to 0",
        ),
    ],
)
def test_an_objective_and_a_model_that_do_not_fit(objective, model, message):
    with pytest.raises(UserError) as refusal:
        objective.check(model)
    assert str(refusal.value) == message


LOSSES = ["generator_loss", "discriminator_loss"]
ACCURACIES = ["real_accuracy", "fake_accuracy"]
SEEN = ["diversity", "frechet_distance", "kernel_distance"]


@pytest.mark.parametrize(
    ("objective", "model", "signature", "train", "validation", "best"),
    [
        ({}, DCGANSpec(), digits, LOSSES + ACCURACIES, SEEN, "frechet_distance"),
        ({}, DCGANSpec(), None, LOSSES + ACCURACIES, SEEN, "frechet_distance"),
        ({}, DCGANSpec(), images(8, num_outputs=1), LOSSES + ACCURACIES, ["diversity"], None),
        ({}, GANSpec(), Signature(input_shape=(3,)), LOSSES + ACCURACIES, SEEN, "frechet_distance"),
        ({"loss": "wasserstein"}, DCGANSpec(), digits, LOSSES, SEEN, "frechet_distance"),
        ({}, ConditionalGANSpec(), digits, LOSSES + ACCURACIES, [*SEEN, "label_agreement"], "frechet_distance"),
        (
            {"l1_weight": 9},
            Pix2PixSpec(),
            pairs(8),
            [*LOSSES, *ACCURACIES, "l1"],
            [*SEEN, "l1"],
            "frechet_distance",
        ),
        ({}, Pix2PixSpec(), images(8, condition_shape=(1, 8, 8), num_outputs=1), LOSSES + ACCURACIES,
         ["diversity", "l1"], "l1"),
    ],
)  # fmt: skip
def test_what_is_reported_of_each_model_and_data(objective, model, signature, train, validation, best):
    reported = AdversarialObjectiveSpec(**objective).reported(model, signature)
    assert [metric.name for metric in reported.train] == train
    assert [metric.name for metric in reported.validation] == validation
    assert reported.best == best
    assert best is None or METRICS[best].better == "less"


def test_each_floor_is_that_of_a_metric_that_is_reported():
    floors = {metric.name: metric.floor_of for metric in METRICS.values() if metric.floor_of}
    assert floors == {"frechet_floor": "frechet_distance", "kernel_floor": "kernel_distance"}


def test_an_objective_and_a_model_that_fit():
    AdversarialObjectiveSpec(l1_weight=100).check(Pix2PixSpec())
    AdversarialObjectiveSpec(loss="wasserstein").check(DCGANSpec(discriminator_norm="layer"))
    AdversarialObjectiveSpec(loss="wasserstein", gradient_penalty=0).check(DCGANSpec())
    ClassificationSpec().check(MLPSpec())
