"""Anomalies: classes left out of training, thresholds and figures beside scikit-learn's and SciPy's, scores."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import average_precision_score, roc_auc_score

import cluster
from cluster.data.prepare import cache_key, prepared
from cluster.data.sources.bundled import SklearnSpec
from cluster.data.sources.images import DigitsSpec
from cluster.inference.detect import Detector
from nn_models.anomaly import average_precision, false_positives, novel, separation, share_between, threshold
from nn_models.errors import UserError
from nn_models.zoo import METRICS
from tests.unit import made
from tests.unit.test_sequences import lines, ranks

pytestmark = pytest.mark.filterwarnings("error")

# -- which rows are left out of training -----------------------------------------------------------------------------


@pytest.mark.parametrize(("anomaly", "numbers"), [(8, [8]), ("8", [8]), ([0, "3"], [0, 3])])
def test_rows_of_an_anomaly_are_only_tested_on(anomaly, numbers):
    data, usual = prepared(DigitsSpec(anomaly=anomaly)), prepared(DigitsSpec())
    classes = {split: made.split_rows(data, split).columns["target"].values for split in data.manifest.splits}
    every = np.concatenate([made.split_rows(usual, split).columns["target"].values for split in usual.manifest.splits])
    for split in ("train", "validation"):
        assert not np.isin(classes[split], numbers).any()
    assert np.isin(classes["test"], numbers).sum() == np.isin(every, numbers).sum()
    normal = (~np.isin(every, numbers)).sum()
    assert (~np.isin(classes["test"], numbers)).sum() == round(0.2 * normal)  # shares are those of normal rows
    assert sum(map(len, classes.values())) == len(every)
    assert novel(data.manifest.signature) == tuple(numbers)
    assert novel(usual.manifest.signature) == ()


def test_groups_stay_together(tmp_path):
    spec = made.features(tmp_path, 200)
    table = pq.read_table(spec.path)
    pq.write_table(table.append_column("who", pa.array(np.arange(200) // 5)), tmp_path / "rows.parquet")
    spec = spec.model_copy(update={"group": "who"})
    names = prepared(spec).manifest.class_names
    data = prepared(spec.model_copy(update={"anomaly": names[:1]}))
    classes = [made.split_rows(data, split).columns["target"].values for split in ("train", "validation")]
    assert not any((values == 0).any() for values in classes)
    together = table.column(spec.target).to_numpy().reshape(-1, 5)
    normal = sum(5 for of_group in together if names[0] not in [str(label) for label in of_group])
    assert sum(map(len, classes)) <= normal


def test_data_without_anomalies_is_what_it_was_before():
    assert "anomaly" not in DigitsSpec().identity()
    assert cache_key(DigitsSpec(anomaly=8)) != cache_key(DigitsSpec(anomaly=9))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DigitsSpec(anomaly="eight"), "data.anomaly: 'eight' is no class of digits; known: 0, 1, 2"),
        (SklearnSpec(table="breast_cancer", anomaly="malign"), "did you mean malignant?"),
        (SklearnSpec(table="diabetes", anomaly=1), "data.anomaly: rows of sklearn have no classes"),
        (DigitsSpec(anomaly=list(range(10))), "of 0 rows none is left to train on"),
    ],
)
def test_what_is_no_class_is_refused(spec, message):
    with pytest.raises(UserError) as caught:
        prepared(spec)
    assert message in str(caught.value)


# -- figures ---------------------------------------------------------------------------------------------------------

scores = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), st.booleans()), min_size=2, max_size=40)


@given(scores)
@settings(deadline=None)
def test_areas_are_scikit_learns(rows):
    errors = torch.tensor([error for error, _ in rows], dtype=torch.float64)
    truth = torch.tensor([is_one for _, is_one in rows])
    found = separation(errors, truth)
    if truth.all() or not truth.any():
        assert found == {}
        return
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, errors), abs=1e-12)  # sums of float64
    assert found["average_precision"] == pytest.approx(average_precision_score(truth, errors), abs=1e-12)


def test_no_positive_row_has_no_average_precision():
    assert math.isnan(average_precision(torch.ones(3), torch.zeros(3, dtype=torch.bool)))


@pytest.mark.parametrize(("rows", "rate"), [(19, 0.05), (36, 0.05), (162, 0.05), (162, 0.01), (999, 0.2)])
def test_a_threshold_lets_no_more_normal_rows_above_it_than_its_rate(rows, rate):
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(2000):
        drawn = torch.rand(rows, generator=generator, dtype=torch.float64)  # its own distribution function
        value = threshold(drawn, rate)
        shares.append(1 - value)
    share = float(np.mean(shares))
    spread = 4 * np.std(shares) / math.sqrt(2000)  # four standard errors of 2000 draws
    assert rate - 1 / (rows + 1) - spread < share <= rate + spread


@pytest.mark.parametrize(("rows", "rate"), [(18, 0.05), (0, 0.5), (10, 0.0)])
def test_too_few_rows_have_no_threshold(rows, rate):
    assert threshold(torch.rand(rows), rate) is None


@pytest.mark.parametrize(("normal", "above", "validation"), [(325, 8, 162), (71, 1, 36), (10, 0, 19), (1000, 50, 999)])
def test_intervals_of_false_positives_are_scipys(normal, above, validation):
    low, high = false_positives(normal, above=above, validation=validation)
    theirs = stats.betabinom(normal, above + 1, validation - above)
    assert (low, high) == (int(theirs.ppf(0.025)), int(theirs.ppf(0.975)))
    assert theirs.cdf(high) - theirs.cdf(low - 1) >= 0.95


@pytest.mark.parametrize(("count", "of"), [(0, 5), (3, 7), (80, 174), (9, 9)])
def test_intervals_of_shares_are_scipys(count, of):
    theirs = stats.binomtest(count, of).proportion_ci(0.95, method="wilson")
    assert share_between(count, of) == pytest.approx(tuple(theirs), abs=1e-9)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    changes = {"train.epochs": 8, "objective": {"kind": "reconstruction"}}  # without noise a run's test is detection
    return cluster.train("cancer-anomaly", overrides=changes, run=str(folder / "run"), num_workers=0)


def test_a_run_reports_the_areas_beside_pcas_and_its_threshold(run):
    metrics = run.metrics
    assert {"test/auroc", "test/average_precision", "test/pca_auroc", "test/pca_average_precision"} <= set(metrics)
    assert "test/normal_error" not in metrics
    assert all(name.rpartition("/")[2] in METRICS for name in metrics)
    detector = Detector(run.run)
    assert detector.threshold.value == pytest.approx(metrics["validation/normal_error"], rel=1e-5)  # other batches
    assert detector.threshold.rows == 36


def test_a_detector_finds_what_the_test_found(run):
    detection = Detector(run.run).detect()
    table = pa.concat_tables(detection.tables())
    assert table.column_names == ["split", "row", "label", "error", "anomaly"]
    found = detection.found()
    errors, truth = table["error"].to_numpy(), np.array(table["label"].to_pylist()) == "malignant"
    assert found["metrics"]["auroc"] == pytest.approx(roc_auc_score(truth, errors))
    assert found["metrics"]["auroc"] == pytest.approx(run.metrics["test/auroc"], abs=1e-4)  # errors in float32
    above = errors > found["threshold"]
    assert table["anomaly"].to_pylist() == above.tolist()
    assert found["metrics"]["precision"] == pytest.approx((above & truth).sum() / above.sum())
    assert found["metrics"]["recall"] == pytest.approx((above & truth).sum() / truth.sum())
    low, high = found["predicted"]["false_positives"]
    assert found["predicted"]["holds"] == (low <= (above & ~truth).sum() <= high)
    json.dumps(found)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    bunch = load_breast_cancer()
    columns = dict(zip(map(str, bunch.feature_names), bunch.data.T, strict=True))
    columns |= {"kind": bunch.target_names[bunch.target].astype(str)}
    place = tmp_path_factory.mktemp("rows") / "rows.csv"
    pa.csv.write_csv(pa.table(columns), place)
    return place


def test_any_labelled_file(run, file):
    detection = Detector(run.run).detect(str(file), label="kind")
    table = pa.concat_tables(detection.tables())
    assert table["row"].to_pylist() == list(range(569))
    assert detection.found()["anomalies"] == 212
    other = Detector(run.run, anomaly=["benign"], given=1.0).detect(str(file), label="kind")
    list(other.tables())
    assert other.found()["anomalies"] == 357


def test_a_file_without_labels_has_scores_only(run, file):
    detection = Detector(run.run).detect(str(file))
    assert "label" not in pa.concat_tables(detection.tables()).column_names
    assert set(detection.found()) == {"rows", "flagged", "threshold", "rate", "validation_rows"}


def test_the_threshold_may_be_given(run):
    detection = Detector(run.run, given=2.0).detect()
    list(detection.tables())
    found = detection.found()
    assert (found["threshold"], found["rate"], found["validation_rows"]) == (2.0, None, 0)
    assert "predicted" not in found


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"rate": 0.001}, None, "--rate: 0.001 of 36 validation rows is less than one; give 0.027 or more"),
        ({"anomaly": ["benign"]}, None, "--anomaly: all 36 validation rows are of benign, and none is normal"),
        ({"anomaly": ["malign"]}, None, "--anomaly: no row has the label 'malign'; did you mean malignant?"),
        ({"anomaly": ["malignant"]}, "file", "--anomaly: the rows have no labels to compare with; name their column"),
    ],
)
def test_what_cannot_be_measured_is_refused(run, file, options, data, message):
    with pytest.raises(UserError) as caught:
        list(Detector(run.run, **options).detect(str(file) if data else None).tables())
    assert message in str(caught.value)


def test_ordinary_data_has_no_figures_of_anomalies(tmp_path):
    recipe = {"model": {"kind": "vae", "code": 2}, "objective": {"kind": "variational", "samples": 0}}
    recipe |= {"data": {"kind": "digits"}, "train": {"epochs": 1}}
    outcome = cluster.train(recipe, run=str(tmp_path / "plain"), num_workers=0)
    assert not [name for name in outcome.metrics if "auroc" in name or "normal" in name]
    detection = Detector(outcome.run).detect()
    list(detection.tables())
    assert "metrics" not in detection.found()
    recipe["data"] = {"kind": "digits", "anomaly": 3}
    outcome = cluster.train(recipe, run=str(tmp_path / "vae"), num_workers=0)
    assert {"test/auroc", "validation/normal_error"} <= set(outcome.metrics)


@pytest.mark.parametrize("objective", [{"kind": "denoising"}, {"kind": "variational", "samples": 2}])
def test_any_number_of_ranks_comes_to_the_same_figures(objective, tmp_path):
    kind = "vae" if objective["kind"] == "variational" else "autoencoder"
    recipe = {
        "model": {"kind": kind, "hidden": [8], "code": 2},
        "data": {"kind": "digits", "anomaly": 8},
        "objective": objective,
        "train": {"epochs": 1},
    }
    jobs = [{"recipe": recipe, "world_size": size, "run": str(tmp_path / str(size))} for size in (0, 2)]
    assert all(code == 0 for codes in ranks(jobs) for code in codes)
    for split, name in (("test", "auroc"), ("test", "average_precision"), ("validation", "normal_error")):
        one, two = ([line[name] for line in lines(tmp_path / str(size), split) if name in line] for size in (0, 2))
        assert one
        assert two == pytest.approx(one, rel=2e-3)  # an epoch of float32 sums in another order may swap two rows
    assert all(name in METRICS for line in lines(tmp_path / "0", "test") for name in line if "identity" in name)
