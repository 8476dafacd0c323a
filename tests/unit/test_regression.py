"""Regression: standardised targets, figures and rows in their units, baselines beside them, for any number of ranks."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

import cluster
from cluster.data.manifest import MANIFEST
from cluster.data.prepare import prepare, prepared
from cluster.data.rows import table_rows
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.inference.evaluate import evaluate_run
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.splits import open_splits
from cluster.tuning.fused.loop import FusedLoop
from jobs.report import write_report
from nn_models.errors import UserError
from nn_models.regression import LeastSquares
from nn_models.spec import validate
from tests.unit.test_figures import batches, lines

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch's own
]

ROWS = 1200


def houses(folder, **more):
    """Prices around 300,000 that are nearly linear in two features."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(50, 20, ROWS), generator.normal(0, 0.1, ROWS)
    price = 300_000 + 2_000 * (a - 50) + 100_000 * b + generator.normal(0, 3_000, ROWS)
    columns = {"a": a, "b": b, "price": price}
    pq.write_table(pa.table(columns), folder / "houses.parquet", row_group_size=500)
    return {
        "model": {"kind": "mlp", "hidden": []},
        "data": {"kind": "parquet", "path": str(folder / "houses.parquet"), "input": ["a", "b"], "target": "price"}
        | more,
        "objective": {"kind": "regression"},
        "optimizer": {"kind": "adamw", "lr": 0.02, "weight_decay": 0.0},
        "train": {"epochs": 10, "global_batch_size": 64, "log_every_steps": 5},
    }


def arrays(data, split):
    """(inputs, targets) as they are stored."""
    columns = table_rows(data.table(split), data.manifest).columns
    return columns["input"].values.astype(float), columns["target"].values[:, 0].astype(float)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("houses")
    recipe = houses(folder)
    return recipe, cluster.train(recipe, run=str(folder / "run"))


def test_prices_are_learnt_and_told_in_their_units(run):
    recipe, outcome = run
    metrics = outcome.metrics
    assert metrics["test/loss"] < 0.05  # of standardised prices
    _, targets = arrays(prepared(load_recipe(recipe).data), "train")
    assert metrics["test/mse"] == pytest.approx(metrics["test/loss"] * targets.var(), rel=1e-5)
    assert 1_000 < metrics["test/mae"] < 6_000
    assert metrics["test/r2"] > 0.95
    assert evaluate_run(outcome.run)["metrics"]["test/mse"] == pytest.approx(metrics["test/mse"])


def test_all_test_rows_are_kept_in_their_units(run):
    recipe, outcome = run
    kept = load_file(f"{outcome.run}/evaluation.safetensors")
    _, truth = arrays(prepared(load_recipe(recipe).data), "test")
    targets, predictions = kept["targets"][:, 0].numpy(), kept["predictions"][:, 0].numpy()
    assert targets == pytest.approx(truth, rel=1e-6)
    assert mean_squared_error(truth, predictions) == pytest.approx(outcome.metrics["test/mse"], rel=1e-4)
    assert mean_absolute_error(truth, predictions) == pytest.approx(outcome.metrics["test/mae"], rel=1e-4)
    assert r2_score(truth, predictions) == pytest.approx(outcome.metrics["test/r2"], rel=1e-4)
    assert kept["example_predictions"][0, 0].item() == pytest.approx(predictions[0], rel=1e-6)


def test_baselines_are_those_of_scikit_learn(run):
    recipe, outcome = run
    data = prepared(load_recipe(recipe).data)
    train, test = arrays(data, "train"), arrays(data, "test")
    for name, model in (("linear", LinearRegression()), ("mean", DummyRegressor())):
        predictions = model.fit(*train).predict(test[0])
        assert outcome.metrics[f"test/{name}_mse"] == pytest.approx(mean_squared_error(test[1], predictions), rel=1e-4)
        assert outcome.metrics[f"test/{name}_mae"] == pytest.approx(mean_absolute_error(test[1], predictions), rel=1e-4)
    assert not any("linear" in name for name in outcome.metrics if name.startswith("validation/"))


def test_the_report_shows_all_rows_residuals_and_baselines(run):
    with open(write_report(run[1].run)) as file:
        page = file.read()
    assert "All 120 rows of the test split" in page
    assert page.count("<circle") >= 2 * 120
    assert "residuals of output 1" in page
    for words in ("the model", "linear regression", "always the mean"):
        assert f'<th scope="row">{words}</th>' in page


def test_collinear_features_have_a_linear_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator)
    x = torch.cat((x, x[:, :1] + x[:, 1:2], torch.zeros(50, 1)), 1)  # one too many, and one that is constant
    y = x[:, :1] * 3 - 2 + torch.randn(50, 1, generator=generator)
    baseline = LeastSquares(5, 1)
    for rows, batch in batches(y, [20, 30]):
        baseline.add(type(batch)({"input": x[rows], "target": y[rows]}, batch.place, batch.draw_keys))
    found = baseline.models(lambda values: values, torch.device("cpu"))
    wanted = LinearRegression().fit(x, y[:, 0]).predict(x)
    assert found["linear"](x)[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)
    assert found["mean"](x)[:, 0].tolist() == pytest.approx([float(y.mean())] * 50)


def test_ranks_regress_as_one(tmp_path):
    recipe = houses(tmp_path)
    recipe["train"] = recipe["train"] | {"epochs": 2}
    recipe["objective"] = recipe["objective"] | {"metrics": ["r2"]}
    jobs = [{"recipe": recipe, "run": str(tmp_path / f"{size}"), "world_size": size} for size in (0, 3)]
    subprocess.run([sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)], timeout=200, check=True)
    for split in ("train", "validation", "test"):
        ours, theirs = lines(tmp_path / "3", split), lines(tmp_path / "0", split)
        assert len(ours) == len(theirs) > 0
        for line, other in zip(ours, theirs, strict=True):
            for name in ("loss", "mse", "mae", "r2", "mean_mse", "mean_mae", "linear_mse", "linear_mae"):
                assert (name in line) == (name in other)
                # float32 sums in another order
                assert line.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4), (split, name)
    assert "r2" in lines(tmp_path / "0", "validation")[0]
    assert "linear_mse" in ours[-1]
    kept = [load_file(tmp_path / f"{size}" / "evaluation.safetensors") for size in (0, 3)]
    assert torch.equal(kept[0]["targets"], kept[1]["targets"])
    assert torch.allclose(kept[0]["predictions"], kept[1]["predictions"], rtol=1e-4)


def test_fused_trials_tell_their_errors_in_units(tmp_path):
    recipe = load_recipe(houses(tmp_path), {"train.epochs": 2})
    trials = [recipe, load_recipe(recipe, {"optimizer.lr": 0.05})]
    folders = [Folder(tmp_path / f"fused-{number}").create() for number in range(2)]
    with FusedLoop(
        trials, splits=open_splits(prepared(recipe.data), window=None), runs=folders, device=torch.device("cpu")
    ) as loop:
        while not loop.ended:
            loop.epoch()
        loop.conclude()
    for number, trial in enumerate(trials):
        alone = cluster.train(trial, run=str(tmp_path / f"alone-{number}")).metrics
        # float32 sums in another order
        assert loop.results[number]["metrics"] == pytest.approx(alone, rel=1e-3)


def test_data_that_was_prepared_before_is_read_as_it_is(tmp_path):
    section = houses(tmp_path)["data"]
    prepare(validate(AnyDataSpec, section, prefix="data"), Folder(tmp_path / "old"))
    file = tmp_path / "old" / MANIFEST
    content = json.loads(file.read_text())
    del content["columns"]["target"]["mean"], content["columns"]["target"]["std"]
    file.write_text(json.dumps(content))
    recipe = houses(tmp_path) | {"data": {"kind": "shards", "path": str(tmp_path / "old")}}
    recipe["train"] = recipe["train"] | {"epochs": 1}
    metrics = cluster.train(recipe, run=str(tmp_path / "run")).metrics
    assert metrics["test/loss"] == pytest.approx(metrics["test/mse"], rel=1e-5)
    assert metrics["test/mean_mse"] < 1e-1 * metrics["test/mse"]


def test_a_run_of_before_does_not_go_on_with_other_targets(tmp_path):
    recipe = houses(tmp_path)
    cluster.train(recipe, run=str(tmp_path / "run"))
    (tmp_path / "run" / "result.json").unlink()
    for file in (tmp_path / "run" / "checkpoints").rglob("*"):
        if file.is_file():
            state = torch.load(file, weights_only=True)
            state["rows"] = state["rows"].replace(" standardised", "")
            state.pop("data", None)
            torch.save(state, file)
    with pytest.raises(UserError, match="the data has changed since this run began"):
        cluster.train(recipe, run=str(tmp_path / "run"), resume=True)
