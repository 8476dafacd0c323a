"""The quality monitor: features, Frechet and kernel distance, diversity, agreement with labels, collapse."""

import logging

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from cluster.adversarial import features as features_module
from cluster.adversarial.collapse import CollapseWatch
from cluster.adversarial.features import FOLDER, WEIGHTS, Features, open_features
from cluster.adversarial.quality import Quality, _Distances, _spread
from cluster.data.manifest import StoredColumn
from cluster.data.prepare import prepared
from cluster.data.shards import DataSet, some_rows
from cluster.data.sources.images import DigitsSpec
from cluster.data.sources.prepared import ShardsSpec
from cluster.recipe.adversarial import AdversarialTrainSpec, CollapseSpec, QualitySpec
from cluster.recipe.recipe import Recipe, TrainSpec
from cluster.storage import Folder
from cluster.training.checkpoints import restore_model
from cluster.training.run_directory import RunDirectory
from cluster.training.splits import open_splits
from nn_models.adversarial import ConditionalGANSpec, DCGANSpec, GANSpec
from nn_models.adversarial_losses import AdversarialObjectiveSpec
from nn_models.columns import Label, Numbers
from nn_models.errors import UserError
from nn_models.pix2pix import Pix2PixSpec
from tests.unit import made

QUICK = TrainSpec(epochs=1, global_batch_size=32)
CPU = torch.device("cpu")


def normal(rows, mean, covariance, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.multivariate_normal(mean, covariance, rows))


def all_rows(data, split="validation"):
    """(images in [-1, 1], labels), computed without any of the monitor's code."""
    rows = made.split_rows(data, split)
    images, labels = (rows.columns[name].values for name in ("input", "target"))
    return torch.from_numpy(images.astype(np.float32)) / 127.5 - 1, torch.from_numpy(labels.copy())


def as_trained_on(data):
    """The inputs of the validation split as the classifier's training reads them."""
    recipe = features_module.classifier_recipe(data)
    rows = open_splits(data, window=None).evaluation("validation", recipe, rank=0, world_size=1, device=CPU)
    return torch.cat([batch["input"] for (batch,) in rows.batches(0)])


def without_classes(data, column):
    """The same data with another column to predict."""
    columns = {**data.manifest.columns, "target": StoredColumn(column=column, dtype="float32", moments=False)}
    other = DataSet(data.folder)
    other.manifest = data.manifest.model_copy(update={"columns": columns})
    return other


@pytest.fixture(scope="session")
def digits():
    return prepared(DigitsSpec())


@pytest.fixture(scope="session")
def seen(digits):
    """The digits' features, trained as they are for a user."""
    features = open_features(digits)
    assert features is not None
    return features


@pytest.fixture
def small(tmp_path):
    return made.written(made.images(tmp_path / "source", 150, shape=(1, 8, 8)), tmp_path / "data")


def quality_of(data, spec, features, split="validation", **quality):
    recipe = Recipe(
        model=spec,
        data=ShardsSpec(path=data.folder.uri),
        objective=AdversarialObjectiveSpec(),
        adversarial=AdversarialTrainSpec(quality=QualitySpec(**quality)),
    )
    return Quality(features, data, recipe=recipe, split=split)


def digits_quality(seen, digits, spec=None, split="validation", **quality):
    return quality_of(digits, spec or DCGANSpec(), seen, split, **quality)


# -- distances -----------------------------------------------------------------------------------------------------


def frechet(mean, covariance, other_mean, other_covariance):
    """Dowson & Landau 1982, eq. 4, with SciPy's matrix root."""
    root = scipy.linalg.sqrtm(covariance @ other_covariance).real
    return np.square(mean - other_mean).sum() + np.trace(covariance + other_covariance - 2 * root)


def test_the_frechet_distance_is_that_of_the_two_normal_distributions():
    mean, other_mean = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, -1.0])
    factor = np.random.default_rng(3).normal(size=(3, 3))
    covariance, other_covariance = factor @ factor.T + np.eye(3), np.diag([4.0, 1.0, 0.25])
    real, fake = normal(40_000, mean, covariance), normal(40_000, other_mean, other_covariance, seed=1)
    found, _ = _Distances(real)(fake)
    # of the samples' own moments exactly, of the distributions up to the error of 40,000 samples
    moments = [f(x.numpy()) for x in (real, fake) for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    assert found == pytest.approx(frechet(*moments), rel=1e-9)
    assert found == pytest.approx(frechet(mean, covariance, other_mean, other_covariance), rel=0.03)


def test_the_frechet_distance_of_diagonal_covariances_is_that_of_their_deviations():
    real, fake = normal(20_000, [0, 0], np.diag([1.0, 4.0])), normal(20_000, [3, 0], np.diag([1.0, 9.0]), seed=1)
    assert _Distances(real)(fake)[0] == pytest.approx(3**2 + (3 - 2) ** 2, rel=0.03)


def test_rows_are_no_distance_from_themselves():
    rows = normal(300, np.zeros(8), np.eye(8))
    assert _Distances(rows)(rows)[0] == pytest.approx(0, abs=1e-6)  # roots of eigenvalues that are off by 1e-16


def test_the_kernel_distance_is_unbiased_and_grows_with_the_distance():
    mean, covariance = np.zeros(4), np.eye(4)
    same = [_Distances(normal(200, mean, covariance, s))(normal(200, mean, covariance, s + 50))[1] for s in range(30)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 3 * error
    near, far = (_Distances(normal(200, mean, covariance))(normal(200, mean + d, covariance, 1))[1] for d in (0.5, 1))
    assert 10 * error < near < far


def test_the_kernel_distance_is_the_mean_over_all_pairs():
    real, fake = normal(30, np.zeros(3), np.eye(3)), normal(30, np.ones(3), np.eye(3), seed=1)

    def kernel(x, y):
        pairs = [(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if x is not y or i != j]
        return sum((float(a @ b) / 3 + 1) ** 3 for a, b in pairs)

    expected = (kernel(real, real) + kernel(fake, fake)) / (30 * 29) - 2 * kernel(real, fake) / 30**2
    assert _Distances(real)(fake)[1] == pytest.approx(expected, rel=1e-9)


def test_distances_do_not_depend_on_what_was_measured_before_nor_draw_from_the_process_generator():
    distances = _Distances(normal(1500, np.zeros(3), np.eye(3)))  # more than a subset of the kernel distance
    fake = normal(1500, np.ones(3), np.eye(3), seed=1)
    state = torch.get_rng_state()
    first = distances(fake)
    distances(fake * 5)
    torch.rand(3)
    assert distances(fake) == first
    torch.set_rng_state(state)
    distances(fake)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_spread_is_the_mean_distance_of_two_rows():
    rows = normal(2000, np.zeros(5), np.eye(5))
    assert _spread(rows) == pytest.approx(float(torch.pdist(rows).mean()), rel=0.01)  # 16 of 1,999 distances a row
    assert _spread(rows[:2]) == pytest.approx(float((rows[0] - rows[1]).norm()))
    assert _spread(torch.ones(10, 3)) == 0


# -- features ------------------------------------------------------------------------------------------------------


def test_the_digits_classifier_is_accurate(seen, digits):
    images, labels = all_rows(digits)
    assert (seen.predict(images) == labels).float().mean() > 0.95
    assert seen(images).shape == (len(labels), seen.num_features) == (len(labels), 64)
    assert seen.logits(images).shape == (len(labels), 10)
    assert ((seen(images).std(0) > 0).float().mean()) == 1  # none of them is always the same


def test_features_are_what_the_classifiers_last_layer_reads(seen, digits):
    model, _ = restore_model(digits.folder / FOLDER, RunDirectory(digits.folder / FOLDER).recipe("model/recipe.yaml"))
    read = []
    model.dense.output.register_forward_hook(lambda _, inputs, outputs: read.extend([*inputs, outputs]))
    with torch.no_grad():
        for inputs in as_trained_on(digits).split(50):
            model(inputs)
    images, _ = all_rows(digits)
    # float32, whose roundings differ by the way to the same numbers
    torch.testing.assert_close(seen(images), torch.cat(read[::2]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.logits(images), torch.cat(read[1::2]), atol=1e-4, rtol=1e-4)


def test_features_keep_each_channels_normalisation(tmp_path):
    data = made.written(made.images(tmp_path / "source", 60, shape=(3, 8, 9)), tmp_path / "data")
    features = open_features(data, train=QUICK)
    images, _ = all_rows(data)
    # float32, whose roundings differ by the way to the same numbers
    torch.testing.assert_close(images * features.scale + features.shift, as_trained_on(data), atol=1e-5, rtol=1e-5)


def test_features_take_part_in_no_training(seen):
    assert not any(parameter.requires_grad for parameter in seen.parameters())
    assert not any(module.training for module in seen.modules())
    assert not seen(torch.zeros(1, 1, 8, 8, requires_grad=True)).requires_grad


def test_a_classifier_is_trained_once_and_the_same_every_time(small, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "cluster.adversarial.features")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = open_features(small, train=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    training, trained = (record.getMessage() for record in caplog.records)
    assert "training a classifier" in training
    assert str(small.folder) in training
    assert "validation/accuracy" in trained
    assert (small.folder / FOLDER / "model").names() == ["model.safetensors", "recipe.yaml"]

    monkeypatch.setattr(features_module, "fit", None)  # whoever calls it now fails
    again = open_features(small)
    images, _ = all_rows(small)
    assert torch.equal(first(images), again(images))
    monkeypatch.undo()

    (small.folder / FOLDER).delete()
    anew = open_features(small, train=QUICK)
    assert torch.equal(first(images), anew(images))
    assert len(caplog.records) == 4


def test_of_two_processes_the_first_ones_classifier_counts(small, monkeypatch):
    slow, place = features_module._trained, small.folder / FOLDER

    def while_another_is_quicker(*arguments):
        monkeypatch.setattr(features_module, "_trained", slow)
        open_features(small, train=QUICK)
        return b"not needed any more"

    monkeypatch.setattr(features_module, "_trained", while_another_is_quicker)
    assert open_features(small, train=QUICK) is not None
    assert place.read_bytes(WEIGHTS) != b"not needed any more"


def test_a_training_that_was_cut_short_leaves_nothing_to_be_taken_for_a_classifier(small, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(features_module, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        open_features(small, train=QUICK)
    assert not small.folder.exists(f"{FOLDER}/{WEIGHTS}")
    monkeypatch.undo()
    assert open_features(small, train=QUICK) is not None


def test_data_that_cannot_be_written_keep_their_classifier_in_the_cache(small, tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    small.folder.write_text(FOLDER, "a file, so that no folder can be made here")
    first = open_features(small, train=QUICK)
    (kept,) = Folder(tmp_path / "cache" / FOLDER).names()
    assert Folder(tmp_path / "cache" / FOLDER / kept).exists(WEIGHTS)
    monkeypatch.setattr(features_module, "fit", None)
    images, _ = all_rows(small)
    assert torch.equal(open_features(small)(images), first(images))


def test_a_damaged_classifier_is_named_with_what_to_do(small):
    open_features(small, train=QUICK)
    place = small.folder / FOLDER
    place.write_bytes(WEIGHTS, place.read_bytes(WEIGHTS)[:-100])
    with pytest.raises(UserError, match=rf"{place}: .*model.safetensors: damaged .*; delete {place} to have it"):
        open_features(small)


def test_a_classifier_of_other_data_is_named_with_what_to_do(small, tmp_path):
    open_features(small, train=QUICK)
    other = made.written(made.images(tmp_path / "other", 90, shape=(1, 8, 8), seed=1), tmp_path / "more")
    for name in ("model/recipe.yaml", WEIGHTS):
        (other.folder / FOLDER).write_bytes(name, (small.folder / FOLDER).read_bytes(name))
    with pytest.raises(UserError, match=rf"{other.folder}/{FOLDER}: .*other data; delete"):
        open_features(other)


def test_images_without_classes_have_no_features(small):
    for column in (Label(names=("all",)), Numbers(size=1)):
        assert open_features(without_classes(small, column)) is None
    assert not small.folder.exists(FOLDER)


def test_feature_vectors_are_their_own_features(tmp_path):
    data = made.written(made.features(tmp_path / "source", 50), tmp_path / "data")
    features = open_features(data)
    rows = torch.randn(5, 4)
    assert features.num_features == 4
    assert torch.equal(features(rows), rows)


def test_of_a_large_set_only_some_rows_are_trained_on(small, monkeypatch):
    monkeypatch.setattr(features_module, "PIXELS", 2 * 64 * 50)  # 50 rows of 8 x 8, twice
    splits = features_module._splits(small, small.folder / "excerpt")
    assert splits.manifest.rows("train") == splits.tables["train"].num_rows == 50
    assert splits.tables["validation"].num_rows == 5
    assert sorted(splits.tables) == ["train", "validation"]
    assert features_module.classifier_recipe(small).train.epochs == 2
    assert open_features(small) is not None


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 4, 5), (3, 33, 20), (1, 64, 64)])
def test_images_of_any_size_have_a_classifier(tmp_path, shape):
    data = made.written(made.images(tmp_path / "source", 40, shape=shape), tmp_path / "data")
    assert open_features(data, train=QUICK)(torch.zeros(2, *shape)).shape == (2, 64)


def test_some_rows_are_always_the_same_ones_from_all_over_a_split(digits):
    rows, again = some_rows(digits, "train", 300), some_rows(digits, "train", 300)
    assert len(set(rows.ids.tolist())) == 300
    assert rows.ids.tolist() == again.ids.tolist() != sorted(rows.ids.tolist())
    whole = made.split_rows(digits, "train")
    for name, column in rows.columns.items():
        assert np.array_equal(column.values, whole.columns[name].values[rows.ids])
    assert rows.ids.max() - rows.ids.min() > 0.9 * len(whole.ids)
    assert len(some_rows(digits, "validation", 10**6).ids) == digits.manifest.rows("validation")


# -- quality -------------------------------------------------------------------------------------------------------


class Copier:
    """Makes training rows one after the other, and notes what it was asked for."""

    def __init__(self, rows, labels=None):
        self.rows, self.labels, self.made, self.sources, self.conditions = rows, labels, 0, [], []

    def __call__(self, source, condition):
        first, self.made = self.made, self.made + len(source)
        self.sources.append(source)
        self.conditions.append(condition)
        return self.rows[first : self.made]


def test_made_rows_that_are_training_rows_are_as_good_as_the_floor(seen, digits):
    quality = digits_quality(seen, digits)
    images, _ = all_rows(digits, "train")
    metrics = quality.measure(Copier(images[torch.randperm(len(images), generator=torch.manual_seed(1))]))
    assert set(metrics) == {
        "frechet_distance", "kernel_distance", "frechet_floor", "kernel_floor", "diversity"
    }  # fmt: skip
    assert quality.num_rows == digits.manifest.rows("validation")
    assert quality.best_metric == "frechet_distance"
    noise = quality.measure(lambda source, _: torch.randn(len(source), 1, 8, 8).clamp(-1, 1))
    assert metrics["frechet_distance"] < 2 * metrics["frechet_floor"] < 0.2 * noise["frechet_distance"]
    assert metrics["kernel_distance"] < 1 < noise["kernel_distance"]
    assert metrics["diversity"] == pytest.approx(1, abs=0.05)
    assert {name: metrics[name] for name in quality.floor} == quality.floor


def test_held_out_rows_are_no_distance_from_themselves(seen, digits):
    quality = digits_quality(seen, digits)
    rows = some_rows(digits, "validation", quality.num_rows)
    images = torch.from_numpy(rows.columns["input"].values.astype(np.float32)) / 127.5 - 1
    metrics = quality.measure(Copier(images))
    # the images' last bits differ by the way they were computed
    assert metrics["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert metrics["diversity"] == pytest.approx(1, abs=1e-4)


def test_the_same_row_again_and_again_has_no_diversity(seen, digits):
    images, _ = all_rows(digits, "train")
    metrics = digits_quality(seen, digits).measure(lambda source, _: images[:1].expand(len(source), -1, -1, -1))
    assert metrics["diversity"] == pytest.approx(0, abs=1e-6)
    assert metrics["frechet_distance"] > 5 * metrics["frechet_floor"]


def test_the_number_of_rows_is_the_most_there_are_up_to_what_is_asked_for(seen, digits):
    images, _ = all_rows(digits, "train")
    for wanted, split, num_rows in ((64, "validation", 64), (10**6, "test", digits.manifest.rows("test"))):
        copier = Copier(images)
        quality = digits_quality(seen, digits, split=split, num_images=wanted)
        quality.measure(copier)
        assert quality.num_rows == copier.made == num_rows


def test_each_look_sees_the_same_noise(seen, digits):
    images, _ = all_rows(digits, "train")
    quality, looks = digits_quality(seen, digits, DCGANSpec(noise_size=7)), [Copier(images), Copier(images)]
    state = torch.get_rng_state()
    first, second = (quality.measure(look) for look in looks)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    noise, again = (torch.cat(look.sources) for look in looks)
    assert torch.equal(noise, again)
    assert noise.shape == (quality.num_rows, 7)
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert looks[0].conditions[0] is None
    # dropout that serves as noise (pix2pix) draws from the process's generator
    dropped = [quality.measure(lambda source, _: torch.rand(len(source), 1, 8, 8)) for _ in range(2)]
    assert dropped[0] == dropped[1]


def test_a_look_leaves_the_gpus_stream_alone(seen, digits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the GPU is seeded"))
    metrics = digits_quality(seen, digits).measure(lambda source, _: torch.rand(len(source), 1, 8, 8) * 2 - 1)
    assert metrics["frechet_distance"] > 0


def test_labels_agree_where_real_rows_of_the_requested_labels_are_made(seen, digits):
    images, labels = all_rows(digits)
    pools = {label: images[labels == label] for label in range(10)}

    def real(source, condition):
        return torch.stack([pools[int(label)][index % len(pools[int(label)])] for index, label in enumerate(condition)])

    quality = digits_quality(seen, digits, ConditionalGANSpec())
    accuracy = float((seen.predict(images) == labels).float().mean())
    assert quality.measure(real)["label_agreement"] == pytest.approx(accuracy, abs=0.03)  # not quite the same rows
    of_next = quality.measure(lambda source, condition: real(source, (condition + 1) % 10))
    assert of_next["label_agreement"] < 0.05
    copier = Copier(images)
    quality.measure(copier)
    assert torch.cat(copier.conditions).bincount().tolist() == labels.bincount().tolist()  # as in the held-out rows
    assert "label_agreement" not in digits_quality(seen, digits).measure(Copier(images))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_make_metrics_nan(seen, digits, value):
    images, _ = all_rows(digits, "train")
    images[3, 0, 0, 0] = value
    quality = digits_quality(seen, digits, ConditionalGANSpec())
    metrics = quality.measure(Copier(images))
    floor = {name: metrics.pop(name) for name in quality.floor}
    assert all(np.isfinite(list(floor.values())))
    assert all(np.isnan(list(metrics.values())))
    assert set(metrics) == {"frechet_distance", "kernel_distance", "diversity", "label_agreement"}


def test_without_features_the_diversity_is_of_pixels(digits):
    quality = digits_quality(None, without_classes(digits, Label(names=("all",))))
    images, _ = all_rows(digits, "train")
    metrics = quality.measure(Copier(images))
    assert set(metrics) == {"diversity"}
    assert metrics["diversity"] == pytest.approx(1, abs=0.05)
    assert quality.best_metric is None


def test_feature_vectors_are_compared_standardised(tmp_path):
    data = made.written(made.features(tmp_path / "source", 2000), tmp_path / "data")
    quality = quality_of(data, GANSpec(), open_features(data))
    metrics = quality.measure(lambda source, _: torch.randn(len(source), 4))
    # the first feature is the row's number: as wide as the normal distribution, but flat
    assert metrics["frechet_distance"] < 0.2
    assert metrics["diversity"] == pytest.approx(1, abs=0.1)
    off = quality.measure(lambda source, _: torch.randn(len(source), 4) + torch.tensor([2.0, 0, 0, 0]))
    assert off["frechet_distance"] - metrics["frechet_distance"] == pytest.approx(4, abs=0.8)  # means of 200 rows


def test_a_split_with_a_single_row_is_refused(tmp_path):
    data = made.written(made.features(tmp_path / "source", 10, validation_fraction=0.1), tmp_path / "data")
    with pytest.raises(UserError, match=r"adversarial.quality: needs 2 rows .*data.validation_fraction"):
        quality_of(data, GANSpec(), open_features(data))


def test_pairs_are_made_from_the_held_out_conditions(tmp_path):
    from cluster.data.sources.pairs import PairsSpec

    data = made.written(PairsSpec(edges_of=DigitsSpec()), tmp_path / "data")
    features = Features(data.manifest)  # in place of a trained classifier; its features are the pixels
    features.forward = lambda images: images.flatten(1)
    quality = quality_of(data, Pix2PixSpec(), features, num_images=100)
    columns = some_rows(data, "validation", 100).columns
    stored = (columns[name].values.astype(np.float32) for name in ("input", "condition"))
    real, edges = (torch.from_numpy(values) / 127.5 - 1 for values in stored)
    copier = Copier(real)
    assert quality.measure(copier)["l1"] == pytest.approx(0, abs=1e-6)
    assert torch.cat(copier.sources).shape == (100, 0)
    torch.testing.assert_close(torch.cat(copier.conditions), edges)
    assert quality.measure(lambda _, condition: condition)["l1"] == pytest.approx(float((edges - real).abs().mean()))
    unlabelled = quality_of(without_classes(data, Label(names=("all",))), Pix2PixSpec(), None, num_images=100)
    assert unlabelled.best_metric == "l1"
    assert list(unlabelled.measure(Copier(real))) == ["diversity", "l1"]


# -- collapse ------------------------------------------------------------------------------------------------------

FINE = {"diversity": 0.9, "frechet_distance": 3.0}
ALIKE = {"diversity": 0.02, "frechet_distance": 90.0}


def actions(watch, *looks, accuracy=0.8):
    return [watch.look(look, accuracy=accuracy).action for look in looks]


def test_a_game_that_goes_on_is_fine():
    watch = CollapseWatch(CollapseSpec())
    assert actions(watch, *[FINE] * 20) == ["fine"] * 20
    assert watch.look(FINE, accuracy=0.8).reason == ""
    assert watch.learning_rate_factor == 1


def test_rows_that_are_alike_for_some_looks_in_a_row_are_a_collapse():
    watch = CollapseWatch(CollapseSpec(patience=3))
    assert actions(watch, FINE, ALIKE, ALIKE, FINE, ALIKE, ALIKE) == ["fine"] * 6
    verdict = watch.look(ALIKE, accuracy=0.8)
    assert verdict.action == "rollback"
    assert "0.02 times as diverse as real ones" in verdict.reason
    assert "for 3 looks in a row" in verdict.reason


def test_rows_may_be_alike_while_their_diversity_grows():
    watch = CollapseWatch(CollapseSpec(patience=3))
    growing = [{"diversity": d} for d in (0.005, 0.035, 0.08, 0.11, 0.125, 0.12, 0.145, 0.14, 0.17, 0.2)]
    assert actions(watch, *growing) == ["fine"] * 10
    assert actions(watch, {"diversity": 0.19}, {"diversity": 0.2}, {"diversity": 0.1}) == ["fine", "fine", "rollback"]
    assert actions(watch, *growing) == ["fine"] * 10  # from the checkpoint returned to


def test_nothing_is_held_against_a_generator_that_is_better_than_ever():
    watch = CollapseWatch(CollapseSpec(patience=2))
    looks = [(ALIKE, 1.0, improved) for improved in (False, True, False, False)]
    verdicts = [watch.look(metrics, accuracy=accuracy, improved=improved) for metrics, accuracy, improved in looks]
    assert [verdict.action for verdict in verdicts] == ["fine"] * 3 + ["rollback"]


def test_rows_that_never_differ_are_a_collapse():
    same = [{"diversity": 0.0}] * 3
    assert actions(CollapseWatch(CollapseSpec(patience=3)), *same) == ["fine", "fine", "rollback"]


def test_a_discriminator_that_always_wins_is_a_collapse():
    watch = CollapseWatch(CollapseSpec(patience=3))
    verdicts = [watch.look(FINE, accuracy=accuracy) for accuracy in (0.998, 0.999, 0.9, 0.997, 0.999, 0.998)]
    assert [verdict.action for verdict in verdicts] == ["fine"] * 5 + ["rollback"]
    assert "the discriminator told 99.8 % of the rows apart" in verdicts[-1].reason
    assert "for 3 looks in a row" in verdicts[-1].reason


def test_a_loss_without_accuracy_is_judged_by_the_rows_alone():
    watch = CollapseWatch(CollapseSpec(patience=1))
    assert actions(watch, FINE, FINE, accuracy=None) == ["fine", "fine"]
    assert actions(watch, {"diversity": 0.0}, accuracy=None) == ["rollback"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_bad_at_once(value):
    watch = CollapseWatch(CollapseSpec(patience=3))
    verdict = watch.look({**FINE, "frechet_distance": value}, accuracy=0.8)
    assert (verdict.action, verdict.reason) == ("rollback", "frechet_distance became NaN or infinite")
    assert watch.look(FINE, accuracy=value).action == "rollback"


def test_rollbacks_lower_the_learning_rate_and_are_bounded():
    watch = CollapseWatch(CollapseSpec(patience=1, max_rollbacks=2, learning_rate_factor=0.5))
    factors, verdicts = [], []
    for _ in range(3):
        verdicts.append(watch.look(FINE, accuracy=1.0))
        factors.append(watch.learning_rate_factor)
    assert [verdict.action for verdict in verdicts] == ["rollback", "rollback", "stop"]
    assert factors == [0.5, 0.25, 0.25]
    assert watch.state()["rollbacks"] == 2
    assert "after 2 of 2 rollbacks" in verdicts[-1].reason
    assert CollapseWatch(CollapseSpec(patience=1, max_rollbacks=0)).look(FINE, accuracy=1.0).action == "stop"


def test_a_watch_goes_on_from_its_state():
    spec = CollapseSpec(patience=3, max_rollbacks=2)
    looks = [FINE, ALIKE, ALIKE, ALIKE, FINE, {"diversity": 0.1}, ALIKE, ALIKE, ALIKE, FINE, ALIKE, ALIKE, ALIKE]
    expected = actions(CollapseWatch(spec), *looks)
    assert expected.count("rollback") == 2
    assert expected[-1] == "stop"
    state, found = CollapseWatch(spec).state(), []
    for look in looks:
        watch = CollapseWatch(spec)
        watch.load(state)
        found += actions(watch, look)
        state = watch.state()
        assert all(isinstance(value, (int, float)) for value in state.values())
    assert found == expected


def test_quality_and_watch_work_with_a_module(seen, digits):
    """As the coordinator does: a generator that is a module, sampled without gradients."""
    generator: nn.Module = DCGANSpec().build_generator(digits.manifest.signature).eval()

    @torch.no_grad()
    def make(source, condition):
        return generator(source, condition)

    metrics = digits_quality(seen, digits).measure(make)
    assert metrics["diversity"] < 0.1  # untrained: grey rows
    assert CollapseWatch(CollapseSpec()).look(metrics, accuracy=0.5).action == "fine"
