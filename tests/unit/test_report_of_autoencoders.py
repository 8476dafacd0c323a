"""The report of autoencoders: rows and rows again, codes, what moves them, anomalies; a linear net's beside PCA's."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.linalg import orthogonal_procrustes, subspace_angles

import cluster
from jobs.report.sections.components import rotated_onto
from jobs.report.shapes import NUM_BINS, dots, histogram
from tests.unit.test_report import Page, report

pytestmark = pytest.mark.filterwarnings("error")

DENSE = {"kind": "autoencoder", "hidden": [8], "code": 3}
DIGITS = {"kind": "digits"}
CASES = {
    "plain": (DENSE, {"kind": "reconstruction", "loss": "bce"}, DIGITS),
    "denoising": ({**DENSE, "kind": "conv_autoencoder", "channels": [2], "hidden": []}, {"kind": "denoising"}, DIGITS),
    "sparse": ({**DENSE, "code_activation": "sigmoid"}, {"kind": "sparse"}, DIGITS),
    "linear": ({**DENSE, "hidden": []}, {"kind": "reconstruction"}, DIGITS),
    "tied": ({**DENSE, "hidden": [], "tied": True}, {"kind": "reconstruction"}, DIGITS),
    "sequence": ({"kind": "sequence_autoencoder", "hidden": 4, "code": 2}, {"kind": "reconstruction"}, DIGITS),
    "vae": ({"kind": "vae", "hidden": [8], "code": 2}, {"kind": "variational", "samples": 2}, DIGITS),
    "conditional": ({"kind": "conditional_vae", "hidden": [8], "code": 2}, {"kind": "variational"}, DIGITS),
    "anomaly": (DENSE, {"kind": "reconstruction"}, {**DIGITS, "anomaly": 8}),
    "table": ({**DENSE, "code": 1}, {"kind": "reconstruction"},
              {"kind": "sklearn", "table": "breast_cancer", "anomaly": "malignant"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, (model, objective, data) in CASES.items():
        recipe = {"model": model, "objective": objective, "data": data, "train": {"epochs": 2}}
        cluster.train(recipe, run=str(folder / name), num_workers=0)
    return {name: folder / name for name in CASES}


def told(page: Page, start: str) -> list[str]:
    return [alternative for alternative in page.alternatives if alternative.startswith(start)]


@pytest.mark.parametrize("name", CASES)
def test_every_autoencoder_shows_its_rows_and_codes(name, runs):
    page = report(runs[name])
    assert {"Reconstructions", "Codes"} <= set(page.headings)
    assert "cannot be read" not in page.words
    image = name != "table"
    assert ("The first rows" in page.headings) == image
    lines = 3 if name == "denoising" else 2
    rows = [a for a in page.alternatives if a.split(",")[0] in ("the row", "as the net was given it", "again")]
    assert len(rows) == (2 * lines * 12 if image else 0)
    moved = told(page, "h1, step ")
    assert len(moved) == (11 if image else 0)
    assert ("Components beside PCA's" in page.headings) == (name in ("linear", "tied"))
    assert ("The most anomalous rows" in page.headings) == (name == "anomaly")
    assert ("Errors of rows: normal rows" in " ".join(page.alternatives)) == (name in ("anomaly", "table"))


@pytest.mark.parametrize("name", ["anomaly", "table"])
def test_the_threshold_is_that_of_the_run_and_what_it_finds_is_counted(name, runs):
    page, evaluation = report(runs[name]), load_file(runs[name] / "evaluation.safetensors")
    limit = json.loads((runs[name] / "result.json").read_text())["metrics"]["validation/normal_error"]
    (alternative,) = told(page, "Errors of rows: normal rows")
    assert float(alternative.rpartition("threshold ")[2]) == pytest.approx(limit, rel=1e-3)  # in four digits
    anomalous = evaluation["labels"] == (8 if name == "anomaly" else 0)
    above = evaluation["errors"] > limit
    hits, alarms = int((above & anomalous).sum()), int((above & ~anomalous).sum())
    assert f"({hits} of {hits + alarms})" in page.words
    assert f"({hits} of {int(anomalous.sum())})" in page.words
    assert "recall" in page.words


def test_a_linear_net_is_compared_with_pca(runs):
    page, evaluation = report(runs["linear"]), load_file(runs["linear"] / "evaluation.safetensors")
    ours, theirs = evaluation["components/decoder"].T.numpy(), evaluation["pca.components"].T.numpy()
    (largest,) = re.findall(r"Largest angle between both subspaces: ([0-9.]+)°", page.words)
    wanted = np.degrees(subspace_angles(ours.astype(float), theirs.astype(float)))[0]
    assert float(largest) == pytest.approx(wanted, rel=1e-3)  # in four digits
    assert "3 of PCA's components" in page.alternatives
    assert "3 of the net's components" in page.alternatives


def test_components_are_rotated_by_procrustes():
    generator = np.random.default_rng(0)
    theirs = np.linalg.qr(generator.normal(size=(20, 4)))[0].T
    ours = generator.normal(size=(4, 4)) @ theirs  # the same subspace by other vectors
    np.testing.assert_allclose(rotated_onto(ours, theirs), theirs, atol=1e-12)  # float64
    other = generator.normal(size=(4, 20))
    basis, _ = np.linalg.qr(other.T)
    turn, _ = orthogonal_procrustes(basis, theirs.T)
    np.testing.assert_allclose(rotated_onto(other, theirs), (basis @ turn).T, atol=1e-12)  # float64


def test_traversals_begin_and_end_two_deviations_from_the_mean(runs):
    evaluation = load_file(runs["vae"] / "evaluation.safetensors")
    rows = evaluation["codes/traversals"]
    assert rows.shape == (2, 11, 1, 8, 8)
    assert rows.dtype == torch.uint8
    model = cluster.open_model(str(runs["vae"]))
    first = evaluation["example_inputs"][evaluation["example_rows"].argmin()][None]
    code = model.encode(first)
    low = code.clone()
    codes = evaluation["codes"][:16]
    low[:, 0] = codes[:, 0].mean() - 2 * codes[:, 0].std()
    again = model.decode(low).round().clamp(0, 255).to(torch.uint8)[0]
    assert (again.int() - rows[0, 0].int()).abs().max() <= 1  # rounded


def test_histograms_count_every_value():
    values = np.concatenate([np.linspace(0, 1, 1000), [50.0, np.nan]])
    shown = histogram("Some", [("a", "#000", values)], x_label="x", guide=(0.9, "limit"))
    assert shown.guide_label == "limit 0.9"
    assert shown.remark.endswith("stand in the last bar")
    assert shown.groups[0].path.count("L") == NUM_BINS


def test_a_histogram_of_very_different_sizes_is_logarithmic():
    sorts = [("small", "#000", np.full(50, 0.1)), ("large", "#111", np.linspace(1, 100, 50))]
    assert histogram("Some", sorts, x_label="x", highest=1.0).remark == "logarithmic"
    assert histogram("Some", sorts[1:], x_label="x", highest=1.0).remark == ""


def test_dots_have_the_names_of_their_classes():
    shown = dots("Codes", np.arange(4.0), np.arange(4.0), np.array([0, 1, 1, 12]), ["zero", "one"], axes=("a", "b"))
    assert [group.label for group in shown.groups] == ["zero", "one", "12"]
    assert shown.alt == "Codes: 4 rows of 3 classes, by a and b"
