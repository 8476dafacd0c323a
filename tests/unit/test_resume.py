"""What a run must find again when it goes on: the same rows and the same recipe, but for what changes no result."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cluster
from cluster.adversarial.coordinator import Coordinator
from cluster.data.prepare import prepare, prepared
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.identity import data_facts
from cluster.training.loop import Loop
from cluster.training.run_directory import RunDirectory
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from cluster.tuning.roster import OpenData, Roster
from cluster.tuning.space import Space
from cluster.tuning.target import target
from nn_models.errors import UserError

ROWS = 200
WEIGHTS = "model/model.safetensors"


def table(path: Path, *, order: np.ndarray | None = None, labels: tuple[str, str] = ("no", "yes")) -> str:
    """Rows of noise with random labels, in this order."""
    generator = np.random.default_rng(0)
    values, chosen = generator.normal(size=(ROWS, 5)), generator.integers(0, 2, ROWS)
    order = np.arange(ROWS) if order is None else order
    columns = {f"x{place}": values[order, place] for place in range(5)}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**columns, "y": np.array(labels)[chosen[order]]}), path)
    return str(path)


def recipe(path: str, **train: Any) -> dict[str, Any]:
    return {
        "name": "noise",
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"kind": "parquet", "path": path, "input": [f"x{place}" for place in range(5)], "target": "y"},
        "train": {"epochs": 4, "global_batch_size": 20} | train,
    }


def interrupted(described: dict[str, Any], run: Path, owner: Any = Loop, method: str = "_validate") -> None:
    """A run that is interrupted in its second epoch, with a checkpoint of the first."""
    calls, undisturbed = [], getattr(owner, method)

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return undisturbed(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, counted)
        with pytest.raises(KeyboardInterrupt):
            cluster.train(described, run=str(run))
    assert list((run / "checkpoints").iterdir())


def refusal(described: dict[str, Any] | Recipe, run: Path) -> str:
    before = sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*"))
    with pytest.raises(UserError) as caught:
        cluster.train(described, run=str(run), resume=True)
    assert sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*")) == before
    return str(caught.value)


# -- the data ----------------------------------------------------------------------------------------------------------


def test_the_same_rows_in_another_order_are_other_data(tmp_path):
    path, run = tmp_path / "t.parquet", tmp_path / "run"
    interrupted(recipe(table(path)), run)
    table(path, order=np.random.default_rng(2).permutation(ROWS))
    message = refusal(recipe(str(path)), run)
    assert message == (
        f"{run}: the data has changed since this run began, to as many rows with other values, or in another order or "
        "split; give it the data that it began with, or start a new run with another --run"
    )


def test_other_names_of_the_classes_are_other_data(tmp_path):
    path, run = tmp_path / "t.parquet", tmp_path / "run"
    interrupted(recipe(table(path)), run)
    table(path, labels=("nay", "yea"))
    assert "other columns or other names of their classes" in refusal(recipe(str(path)), run)


def test_a_finished_run_is_not_told_as_that_of_other_data(tmp_path):
    path, run = tmp_path / "t.parquet", tmp_path / "run"
    described = recipe(table(path), epochs=1)
    cluster.train(described, run=str(run))
    assert cluster.train(described, run=str(run), resume=True).status == "finished"
    described["data"]["split_seed"] = 7
    assert "began with another recipe (data.split_seed differ)" in refusal(described, run)


@pytest.mark.parametrize("place", ["file", "shards"])
def test_data_that_has_moved_is_the_same(place, tmp_path):
    path, run, whole = tmp_path / "t.parquet", tmp_path / "run", tmp_path / "whole"
    described = recipe(table(path))
    cluster.train(described, run=str(whole))
    interrupted(described, run)
    if place == "file":
        path.rename(tmp_path / "moved.parquet")
        described["data"]["path"] = str(tmp_path / "moved.parquet")
    else:
        prepare(load_recipe(described).data, Folder(tmp_path / "shards"))
        described["data"] = {"kind": "shards", "path": str(tmp_path / "shards")}
    cluster.train(described, run=str(run), resume=True)
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for name in ("recipe.yaml", "model/recipe.yaml"):  # where it is found now
        assert RunDirectory(str(run)).recipe(name).data.model_dump()["path"] == described["data"]["path"]


def test_a_run_of_an_earlier_version_is_compared_by_what_is_left(tmp_path):
    path, run = tmp_path / "t.parquet", tmp_path / "run"
    interrupted(recipe(table(path)), run)
    facts = json.loads((run / "environment.json").read_text())
    del facts["data"]
    (run / "environment.json").write_text(json.dumps(facts))
    table(path, order=np.random.default_rng(2).permutation(ROWS))
    assert "the data has changed since this run began" in refusal(recipe(str(path)), run)  # their mean tells
    assert "began with another recipe (data.path differ)" in refusal(recipe(table(tmp_path / "other.parquet")), run)
    table(path)
    assert cluster.train(recipe(str(path)), run=str(run), resume=True).status == "finished"


def test_a_checkpoint_knows_its_data_even_where_the_directory_does_not(tmp_path):
    path, run = tmp_path / "t.parquet", tmp_path / "run"
    interrupted(recipe(table(path)), run)
    (run / "environment.json").unlink()
    shutil.rmtree(run / "model")
    table(path, order=np.random.default_rng(2).permutation(ROWS))
    with pytest.raises(UserError, match="checkpoints: the data has changed since this run began, to as many rows"):
        cluster.train(recipe(str(path)), run=str(run), resume=True)


def test_a_gan_is_resumed_with_its_own_data(tmp_path, monkeypatch):
    path, run = tmp_path / "t.parquet", tmp_path / "run"
    described = recipe(table(path)) | {
        "model": {"kind": "gan", "noise_size": 3, "generator_hidden": [4], "discriminator_hidden": [4]},
        "objective": {"kind": "adversarial"},
    }
    monkeypatch.setattr("cluster.adversarial.features.open_features", lambda data, device: None)
    interrupted(described, run, Coordinator, "_segment")
    table(path, order=np.random.default_rng(2).permutation(ROWS))
    assert "the data has changed since this run began" in refusal(described, run)
    (run / "environment.json").unlink()
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="checkpoints: the data has changed since this run began, to as many rows"):
        cluster.train(described, run=str(run), resume=True)


# -- the recipe --------------------------------------------------------------------------------------------------------

FREE = {
    "train.keep_checkpoints": 5,
    "train.log_every_steps": 3,
    "train.checkpoint_every_epochs": 2,
    "train.checkpoint_every_steps": 5,
    "train.max_failures": 0,
    "train.cpus_per_worker": 1,
    "name": "renamed",
}


def test_what_changes_no_result_may_change(tmp_path):
    described, run, whole = recipe(table(tmp_path / "t.parquet")), tmp_path / "run", tmp_path / "whole"
    cluster.train(described, run=str(whole))
    interrupted(described, run)
    outcome = cluster.train(described, run=str(run), resume=True, overrides=FREE)
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert outcome.result["checkpoint"] == "checkpoints/step-0000000032.pt"
    kept = RunDirectory(str(run)).recipe()
    assert (kept.train.keep_checkpoints, kept.name) == (5, "renamed")
    assert len(list((run / "checkpoints").iterdir())) == 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer.lr": 0.5}, "optimizer.lr"),
        ({"train.epochs": 5, "train.keep_checkpoints": 5}, "train.epochs"),
        ({"data.shuffle_window": 50}, "data.shuffle_window"),
        ({"changes": [{"epoch": 1, "set": {"optimizer.lr": 0.5}}]}, "changes"),
        ({"model": {"kind": "mlp", "hidden": [4], "dropout": 0.5}}, "model.dropout"),
    ],
)
def test_what_changes_a_result_may_not(changes, told, tmp_path):
    described, run = load_recipe(recipe(table(tmp_path / "t.parquet"))), tmp_path / "run"
    RunDirectory(str(run)).begin(described, {})
    with pytest.raises(UserError) as caught:
        cluster.train(described, run=str(run), resume=True, overrides=changes)
    assert str(caught.value) == (
        f"--resume: {run} began with another recipe ({told} differ); continue it with {run}/recipe.yaml, or start anew "
        "with another --run"
    )


def test_a_checkpoint_within_an_epoch_decides_the_result_of_a_pipelined_gan():
    game = recipe("t.parquet", checkpoint_every_steps=5) | {
        "model": {"kind": "gan"},
        "objective": {"kind": "adversarial"},
        "adversarial": {"mode": "pipelined"},
    }
    assert "checkpoint_every_steps" in load_recipe(game).deciding()["train"]
    assert "checkpoint_every_steps" not in load_recipe(game, {"adversarial.mode": "exact"}).deciding()["train"]


# -- sweeps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path) -> tuple[dict[str, Any], Path]:
    """A sweep's recipe, and the directory of one that has begun."""
    described = recipe(table(tmp_path / "t.parquet")) | {"sweep": {"space": {"optimizer.lr": {"uniform": [0.1, 1]}}}}
    resolved = load_recipe(described)
    facts = {"data": data_facts(prepared(resolved.data).manifest)}
    SweepDirectory(str(tmp_path / "sweep")).begin(resolved, facts)
    return described, tmp_path / "sweep"


def test_a_sweep_goes_on_with_its_own_data(begun):
    described, run = begun
    table(Path(described["data"]["path"]), order=np.random.default_rng(2).permutation(ROWS))
    with pytest.raises(UserError, match="the data has changed since this run began, to as many rows with other values"):
        cluster.sweep(described, run=str(run), resume=True)


def test_a_sweep_goes_on_with_its_own_recipe(begun, monkeypatch):
    described, run = begun
    with pytest.raises(UserError, match=r"began with another recipe \(sweep.num_trials differ\)"):
        cluster.sweep(described, run=str(run), resume=True, overrides={"sweep.num_trials": 3})

    class Starts(Exception):
        pass

    def started(**_: Any) -> None:
        raise Starts

    moved = table(Path(described["data"]["path"]).with_name("moved.parquet"))
    changes = {"sweep.max_failures": 0, "train.keep_checkpoints": 1, "data.path": moved}
    monkeypatch.setattr("cluster.tuning.sweep.ray_session", started)
    with pytest.raises(Starts):
        cluster.sweep(described, run=str(run), resume=True, overrides=changes)


def test_trials_that_have_ended_are_of_the_data_that_their_values_name(tmp_path):
    paths = [table(tmp_path / f"{name}.parquet") for name in "ab"]
    described = recipe(paths[0]) | {"sweep": {"space": {"data.path": {"grid": paths}}, "searcher": "grid"}}
    resolved = load_recipe(described)
    directory = SweepDirectory(str(tmp_path / "sweep"))
    directory.begin(resolved, {})
    for index, path in enumerate(paths):
        facts = {"data": data_facts(prepared(load_recipe(described, {"data.path": path}).data).manifest)}
        directory.trial(index).write_json("environment.json", facts)
        directory.write(TrialRecord(index, {"data.path": path}, status="finished", value=0.5))

    def taken_up() -> Roster:
        manifest = prepared(resolved.data).manifest
        roster = Roster(resolved, Space(resolved.sweep), target(resolved, manifest), directory, OpenData())
        roster.take_up(False)
        return roster

    assert taken_up().left == 0
    table(Path(paths[1]), order=np.random.default_rng(2).permutation(ROWS))
    with pytest.raises(UserError, match="trials/0001: the data has changed since this run began"):
        taken_up()
