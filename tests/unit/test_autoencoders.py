"""Autoencoders in training: the same on any number of ranks, resumed bit for bit, their evidence, and bad input."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import cluster
from cluster.data.manifest import StoredColumn
from cluster.data.prepare import prepared
from cluster.data.rows import table_rows
from cluster.data.scaling import Scaling
from cluster.inference.evaluate import evaluate_run
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.runs.summary import summarise
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from jobs.report import write_report
from nn_models.columns import Features, Image
from nn_models.denoising import corrupted
from nn_models.errors import UserError

WORLDS = (0, 1, 2)
DENSE = {"kind": "autoencoder", "hidden": [16], "code": 6}
SIGMOID = {**DENSE, "code_activation": "sigmoid"}
VAE = {"kind": "vae", "hidden": [16], "code": 4}
# what draws noise, what sums over ranks, what asks a net for more than rows
CASES = {
    "plain": (DENSE, {"kind": "reconstruction", "loss": "bce"}),
    "sparse": (SIGMOID, {"kind": "sparse", "weight": 0.01}),
    "denoising": (DENSE, {"kind": "denoising", "noise": "masking"}),
    "contractive": ({"kind": "conv_autoencoder", "channels": [3], "code": 6}, {"kind": "contractive"}),
    "sequence": ({"kind": "sequence_autoencoder", "hidden": 8, "code": 4}, {"kind": "denoising"}),
    "variational": (VAE, {"kind": "variational", "free_bits": 0.1, "samples": 3}),
    "conditional": (
        {**VAE, "kind": "conditional_vae", "decoder": "gaussian"},
        {"kind": "variational", "samples": 0, "beta": 2},
    ),
}
RESUMED = [*((case, "2") for case in CASES), ("denoising", "0"), ("variational", "0")]
EACH = pytest.mark.parametrize("case", CASES)


def recipe(case, **train):
    model, objective = CASES[case]
    return {
        "model": model,
        "data": {"kind": "digits"},
        "objective": objective,
        "optimizer": {"kind": "sgd", "lr": 0.001 if case in ("variational", "conditional") else 0.1, "momentum": 0.5},
        "train": {"epochs": 2, "global_batch_size": 250, "log_every_steps": 1, "keep_checkpoints": 1} | train,
    }


def run(jobs):
    line = [sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)]
    process = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def lines(path: Path, split: str):
    return [
        line for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if line["split"] == split
    ]


def digests(path: Path):
    return [line["rows_digest"] for line in lines(path, "train") if "rows_digest" in line]


def figures(path: Path, split: str) -> np.ndarray:
    beside = ("step", "epoch", "split", "time_s", "rows_per_s", "learning_rate", "rows_digest", "end_of_epoch")
    return np.array([[value for name, value in line.items() if name not in beside] for line in lines(path, split)])


def weights(path: Path):
    state = Checkpoints(Folder(path / "checkpoints"), keep=1).newest()
    assert state is not None
    return state["model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Undisturbed runs, CASE/RANKS; "pieces" computes each step in two pieces."""
    folder = tmp_path_factory.mktemp("whole")
    jobs = [
        {"recipe": recipe(case, checkpoint_every_steps=2), "world_size": ranks, "run": str(folder / case / str(ranks))}
        for case in CASES
        for ranks in WORLDS
    ]
    jobs += [
        {"recipe": recipe(case, accumulation=2), "world_size": 0, "run": str(folder / case / "pieces")}
        for case in CASES
    ]
    assert all(code == 0 for codes in run(jobs) for code in codes)
    return folder


@EACH
def test_every_number_of_ranks_comes_to_the_same_figures(case, whole):
    assert len(digests(whole / case / "0")) == 2
    for ranks in WORLDS[1:]:
        assert digests(whole / case / str(ranks)) == digests(whole / case / "0")
        for split in ("train", "validation"):
            ours, one = figures(whole / case / str(ranks), split), figures(whole / case / "0", split)
            np.testing.assert_allclose(ours, one, rtol=2e-5)  # float32 sums in another order, over 10 steps
    assert np.array_equal(figures(whole / case / "1", "train"), figures(whole / case / "0", "train"))
    ours, one = weights(whole / case / "2"), weights(whole / case / "0")
    for name in one:
        torch.testing.assert_close(ours[name], one[name], rtol=1e-4, atol=1e-5)  # the same


@EACH
def test_pieces_draw_the_same_noise(case, whole):
    assert digests(whole / case / "pieces") == digests(whole / case / "0")
    # what a batch has in common is that of a piece: half as many rows say a little less exactly what the mean is
    tolerance = 2e-2 if case in ("sparse", "variational") else 2e-5
    np.testing.assert_allclose(
        figures(whole / case / "pieces", "train"), figures(whole / case / "0", "train"), rtol=tolerance
    )


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """Runs that were killed in step 8, in mid-epoch, and resumed: CASE/RANKS."""
    folder = tmp_path_factory.mktemp("resumed")
    jobs = [
        {"recipe": recipe(case, checkpoint_every_steps=2), "world_size": int(ranks), "run": str(folder / case / ranks)}
        for case, ranks in RESUMED
    ]
    codes = run([job | dying for job in jobs for dying in ({"dies_at": 8}, {})])
    assert all(set(codes[place]) == {9 if place % 2 == 0 else 0} for place in range(len(codes)))
    return folder


@pytest.mark.parametrize(("case", "ranks"), RESUMED)
def test_killed_in_mid_epoch_and_resumed_it_ends_bit_for_bit_the_same(case, ranks, whole, resumed):
    ours, wanted = resumed / case / ranks, whole / case / ranks
    assert digests(ours) == digests(wanted)
    for split in ("train", "validation"):
        assert np.array_equal(figures(ours, split), figures(wanted, split))
    mine, other = weights(ours), weights(wanted)
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_the_bound_of_many_samples_is_tighter_at_every_evaluation(whole):
    for line in lines(whole / "variational" / "0", "validation"):
        assert line["negative_bound"] < line["negative_elbo"]
        assert line["negative_elbo"] == pytest.approx(line["reconstruction_nats"] + line["kl_nats"])


# -- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gaussian", "masking", "salt_and_pepper"])
def test_noise_is_of_each_rows_key_and_as_strong_as_asked_for(noise):
    rows = torch.full((400, 1, 10, 10), 0.5)
    keys = torch.arange(400) * 7919
    found = corrupted(rows, keys, noise, 0.3)
    assert torch.equal(corrupted(rows[5:9], keys[5:9], noise, 0.3), found[5:9])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(rows, torch.full_like(rows, 0.5))
    # 40,000 numbers: shares and deviations are within 4 standard errors, 0.009 and less
    if noise == "gaussian":
        assert float((found - rows).std()) == pytest.approx(0.3, abs=0.01)
        assert float((found - rows).mean()) == pytest.approx(0.0, abs=0.01)
        return
    assert float((found == 0).float().mean()) == pytest.approx(0.3 if noise == "masking" else 0.15, abs=0.01)
    assert float((found == 1).float().mean()) == pytest.approx(0.0 if noise == "masking" else 0.15, abs=0.01)
    assert float((found == 0.5).float().mean()) == pytest.approx(0.7, abs=0.01)


# -- what a run leaves ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoised")
    return cluster.train(recipe("denoising"), run=str(folder / "run"), num_workers=0)


def test_a_test_leaves_codes_errors_and_rows_beside_what_became_of_them(denoised):
    kept = load_file(f"{denoised.run}/evaluation.safetensors")
    data = prepared(load_recipe(recipe("denoising")).data)
    rows = table_rows(data.table("test"), data.manifest)
    assert np.array_equal(kept["labels"], rows.columns["target"].values)
    assert kept["codes"].shape == (len(kept["labels"]), 6)
    assert kept["errors"].mean().item() == pytest.approx(denoised.metrics["test/mse"], rel=1e-5)
    assert denoised.metrics["test/row_error"] == pytest.approx(64 * denoised.metrics["test/mse"])
    shown = kept["example_rows"]
    assert shown[:24].tolist() == list(range(24))
    worst = kept["errors"].argsort(descending=True)[:24]
    assert set(shown[24:].tolist()) == set(worst.tolist())
    assert torch.equal(kept["example_errors"], kept["errors"][shown])
    assert np.array_equal(kept["example_inputs"], rows.columns["input"].values[shown])
    assert kept["example_again"].shape == kept["example_given"].shape == kept["example_inputs"].shape
    assert kept["example_again"].dtype == torch.uint8
    masked = kept["example_given"] == 0
    assert torch.equal(kept["example_given"][~masked], kept["example_inputs"][~masked])


def test_pca_and_the_noisy_row_stand_beside_it(denoised):
    metrics, kept = denoised.metrics, load_file(f"{denoised.run}/evaluation.safetensors")
    assert set(metrics) >= {"test/pca_mse", "test/identity_mse"}
    assert not any("pca" in name for name in metrics if not name.startswith("test/"))
    assert kept["pca.components"].shape == (6, 64)
    given, rows = (kept[f"example_{name}"][:24].float().flatten(1) / 255 for name in ("given", "inputs"))
    codes = (given - kept["pca.mean"]) @ kept["pca.components"].T
    again = kept["pca.mean"] + codes @ kept["pca.components"]
    assert (again - rows).square().mean().item() == pytest.approx(metrics["test/pca_mse"], rel=0.2)  # of 24 rows
    assert (given - rows).square().mean().item() == pytest.approx(metrics["test/identity_mse"], rel=0.2)


def test_evaluated_again_it_has_the_same_figures(denoised):
    found = evaluate_run(denoised.run)["metrics"]
    assert found["test/mse"] == pytest.approx(denoised.metrics["test/mse"], rel=1e-6)


def test_an_opened_model_gives_rows_as_the_files_hold_them(denoised):
    opened = cluster.open_model(denoised.run)
    rows = load_file(f"{denoised.run}/evaluation.safetensors")["example_inputs"][:5]
    again = opened(rows)
    wanted = opened.net(rows.float() / 255) * 255
    torch.testing.assert_close(again, wanted, atol=1e-3, rtol=0)  # of 255
    assert "image 1 x 8 x 8" in repr(opened)


def test_the_report_can_be_written(denoised):
    assert Path(write_report(denoised.run)).exists()


def test_a_conditional_net_is_opened_with_labels(tmp_path):
    run = cluster.train(recipe("conditional", epochs=1), run=str(tmp_path / "run"), num_workers=0).run
    opened = cluster.open_model(run)
    rows = load_file(f"{run}/evaluation.safetensors")["example_inputs"][:5]
    threes, sevens = (opened(rows, target=[label] * 5) for label in ("3", "7"))
    assert threes.shape == rows.shape
    assert not torch.equal(threes, sevens)


# -- scales --------------------------------------------------------------------------------------------------------


def test_pixels_are_from_0_to_1_and_other_numbers_standard():
    pixels = StoredColumn(column=Image(shape=(1, 1, 2)), dtype="uint8", mean=(0.3,), std=(0.2,))
    numbers = StoredColumn(column=Features(size=1), mean=(5.0,), std=(2.0,))
    scaling = Scaling({"input": pixels, "condition": numbers}, "pixels", torch.device("cpu"))
    found = scaling({"input": torch.tensor([[[[0, 255]]]], dtype=torch.uint8), "condition": torch.tensor([[9.0]])})
    assert found["input"].flatten().tolist() == pytest.approx([0.0, 1.0])
    assert found["condition"].tolist() == [[2.0]]
    assert scaling.inverse("input", found["input"]).flatten().tolist() == pytest.approx([0, 255])
    bounded = Scaling({"input": pixels}, "bounded", torch.device("cpu"))
    assert bounded({"input": torch.tensor([[[[0, 255]]]], dtype=torch.uint8)})["input"].max() == pytest.approx(1)


# -- bad input -----------------------------------------------------------------------------------------------------


def table(folder, values, **data):
    columns = {f"x{place}": column for place, column in enumerate(np.transpose(values).tolist())}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return {"kind": "parquet", "path": str(folder / "rows.parquet"), "input": list(columns), **data}


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        (DENSE, {"kind": "reconstruction", "loss": "bce"}),
        (DENSE, {"kind": "denoising", "noise": "salt_and_pepper"}),
        (VAE, {"kind": "variational"}),
    ],
)
def test_numbers_that_may_lie_outside_0_to_1_are_refused_where_they_must_not(model, objective, tmp_path):
    data = table(tmp_path, np.random.default_rng(0).normal(3, 2, (60, 8)))
    with pytest.raises(UserError, match=r"data: its input has float32 numbers, which may lie outside 0 to 1"):
        cluster.train({"model": model, "data": data, "objective": objective}, run=str(tmp_path / "run"))


def test_a_table_is_read_in_standard_deviations_and_constant_columns_do_no_harm(tmp_path):
    values = np.random.default_rng(0).normal(300, 20, (200, 5))
    values[:, 2] = 7.0
    described = {
        "model": {**DENSE, "code": 3},
        "data": table(tmp_path, values),
        "objective": {"kind": "reconstruction"},
        "train": {"epochs": 3, "global_batch_size": 20},
    }
    metrics = cluster.train(described, run=str(tmp_path / "run"), num_workers=0).metrics
    assert 0 < metrics["test/mse"] < 1.5
    assert metrics["test/pca_mse"] < 1
    kept = load_file(str(tmp_path / "run" / "evaluation.safetensors"))
    assert kept["example_again"].mean().item() == pytest.approx(kept["example_inputs"].mean().item(), abs=30)


def test_a_table_with_nan_is_refused_by_name(tmp_path):
    values = np.random.default_rng(0).normal(0, 1, (60, 5))
    values[7, 2] = np.nan
    described = {"model": DENSE, "data": table(tmp_path, values), "objective": {"kind": "reconstruction"}}
    with pytest.raises(UserError, match="x2"):
        cluster.train(described, run=str(tmp_path / "run"), num_workers=0)


def test_a_code_as_wide_as_the_rows_is_warned_of_where_nothing_else_holds_it_back(caplog):
    def warned(objective, **model):
        described = load_recipe({"model": {**DENSE, **model}, "data": {"kind": "digits"}, "objective": objective})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            summarise(described, prepared(described.data).manifest)
        return [record.getMessage() for record in caplog.records]

    (message,) = warned({"kind": "reconstruction"}, code=64)
    assert message.startswith("model.code: 64 numbers for rows of 64, so the net can copy them")
    assert not warned({"kind": "reconstruction"}, code=63)
    assert not warned({"kind": "sparse"}, code=100, code_activation="sigmoid")


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        (
            DENSE,
            {"kind": "sparse"},
            "objective.kind: sparse needs codes from 0 to 1 for a mean activation to have a divergence; set "
            "model.code_activation to sigmoid",
        ),
        (
            DENSE,
            {"kind": "classification"},
            "objective.kind: classification takes no model that gives reconstruction, as autoencoder does; set "
            "objective.kind to reconstruction",
        ),
        (
            VAE,
            {"kind": "denoising"},
            "objective.kind: denoising takes no model that gives posterior, as vae does; set objective.kind to "
            "variational",
        ),
        (
            {"kind": "mlp"},
            {"kind": "variational"},
            "objective.kind: variational takes no model that gives row, as mlp does; choose another objective",
        ),
        (
            {"kind": "conv_autoencoder", "channels": [2, 2, 2, 2]},
            {"kind": "reconstruction"},
            "model.channels: [2, 2, 2, 2] halves images 4 times, but those of 8x8 are a pixel after 3; shorten it to 3",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(model, objective, message):
    described = load_recipe({"model": model, "data": {"kind": "digits"}, "objective": objective})
    with pytest.raises(UserError) as refusal:
        check(described, prepared(described.data).manifest)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": "denoising", "noise": "masking", "level": 1.5}, "objective.level: masking changes a share"),
        ({"kind": "sparse", "rho": 1}, "objective.rho: must be less than 1"),
        ({"kind": "contractive", "weight": 0}, "objective.weight: must be greater than 0"),
        ({"kind": "variational", "beta": -1}, "objective.beta: must be greater than or equal to 0"),
        ({"kind": "reconstruction", "loss": "mae"}, "objective.loss: must be 'mse', 'bce' or 'l1', not 'mae'"),
    ],
)
def test_wrong_values_are_refused(objective, message):
    with pytest.raises(UserError) as refusal:
        load_recipe({"model": DENSE, "data": {"kind": "digits"}, "objective": objective})
    assert str(refusal.value).startswith(message)


def test_a_net_that_is_told_labels_needs_some(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 16), dtype=np.uint8)
    pq.write_table(pa.table({"x": pa.array(list(pixels))}), tmp_path / "rows.parquet")
    data = {"kind": "parquet", "path": str(tmp_path / "rows.parquet"), "input": "x", "image_shape": [1, 4, 4]}
    described = {"model": {**VAE, "kind": "conditional_vae"}, "data": data, "objective": {"kind": "variational"}}
    with pytest.raises(
        UserError, match=r"model\.kind: conditional_vae is told each row's label, but the data has 1 class"
    ):
        cluster.train(described, run=str(tmp_path / "run"), num_workers=0)
    described["model"] = VAE
    assert cluster.train(described | {"train": {"epochs": 1}}, run=str(tmp_path / "run"), num_workers=0).metrics


def test_windows_of_a_series_are_given_again(tmp_path):
    described = {
        "model": {"kind": "sequence_autoencoder", "hidden": 12, "code": 4, "cell": "lstm"},
        "data": {"kind": "adding", "length": 6, "rows": 400},
        "objective": {"kind": "reconstruction", "loss": "l1"},
        "optimizer": {"kind": "adam", "lr": 0.01},
        "train": {"epochs": 4, "global_batch_size": 40},
    }
    run = cluster.train(described, run=str(tmp_path / "run"), num_workers=0)
    losses = [line["loss"] for line in lines(tmp_path / "run", "validation")]
    assert losses[-1] < 0.95 * losses[0]
    kept = load_file(f"{run.run}/evaluation.safetensors")
    assert kept["example_again"].shape == kept["example_inputs"].shape == (48, 6, 2)


def test_convolutions_of_a_table_are_refused(tmp_path):
    data = table(tmp_path, np.random.default_rng(0).normal(0, 1, (60, 5)))
    model = {**VAE, "channels": [4], "decoder": "gaussian"}
    with pytest.raises(UserError, match=r"model\.channels: convolutions read images, but the data has features 5"):
        cluster.train({"model": model, "data": data, "objective": {"kind": "variational"}}, run=str(tmp_path / "run"))
