"""Whose figures a run shows: those of the weights that it keeps, the last epoch's apart; epochs count from 1."""

import json
from pathlib import Path
from typing import Any

import pytest

import cluster
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import read_best, read_model, save_model
from cluster.training.progress import Progress
from cluster.training.run_directory import RunDirectory, read_metrics, result_of
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from cluster.tuning.roster import OpenData, Roster
from cluster.tuning.space import Space
from cluster.tuning.target import target
from jobs.report import write_report
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")


def worsening(folder: Path) -> dict[str, Any]:
    """A run whose weights are best after its second epoch: from then on each step takes nine tenths of them away."""
    spec = made.features(folder, 200, validation_fraction=0.2)
    return {
        "model": {"kind": "mlp", "hidden": [8], "activation": "tanh"},
        "data": spec.model_dump(mode="json"),
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
        "train": {"epochs": 4, "global_batch_size": 20, "log_every_steps": 1},
        "changes": [{"epoch": 2, "set": {"optimizer.momentum": 0, "optimizer.weight_decay": 9}}],
    }


def lines(run: str, split: str) -> list[dict[str, Any]]:
    ended = [line for line in read_metrics(RunDirectory(run)) if line["split"] == split]
    return [line for line in ended if split != "train" or line.get("end_of_epoch")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> cluster.Outcome:
    folder = tmp_path_factory.mktemp("worsening")
    return cluster.train(worsening(folder / "data"), run=str(folder / "run"))


def test_all_figures_are_of_the_weights_that_are_kept(outcome):
    validation, train = lines(outcome.run, "validation"), lines(outcome.run, "train")
    assert validation[1]["accuracy"] > max(line["accuracy"] for line in (validation[0], *validation[2:]))
    for split in ("validation", "test"):
        told = {name: value for name, value in outcome.metrics.items() if name.startswith(f"{split}/")}
        assert told.items() <= cluster.evaluate(outcome.run, split=split)["metrics"].items()
    assert outcome.metrics["validation/accuracy"] == validation[1]["accuracy"] == outcome.result["best"]["value"]
    assert outcome.metrics["train/loss"] == train[1]["loss"]
    assert json.loads(Path(outcome.run, "result.json").read_text())["metrics"] == outcome.metrics


def test_the_last_epochs_are_named_so(outcome):
    validation, train = lines(outcome.run, "validation"), lines(outcome.run, "train")
    last = outcome.result["last"]
    assert (last["epoch"], last["step"]) == (4, validation[-1]["step"])
    assert last["metrics"]["validation/accuracy"] == validation[-1]["accuracy"]
    assert last["metrics"]["train/loss"] == train[-1]["loss"]


def test_epochs_count_from_1(outcome):
    assert outcome.result["best"]["epoch"] == 2
    assert "of epoch 2" in repr(outcome.load_model())
    page = Path(write_report(outcome.run)).read_text()
    assert ", epoch 2<" in page.replace("\n", "")


def test_a_run_that_was_stopped_tells_of_the_weights_that_are_there(outcome, tmp_path):
    stopped = result_of({"status": "stopped"}, RunDirectory(outcome.run), began=0.0)
    kept = {name: value for name, value in outcome.metrics.items() if not name.startswith("test/")}
    assert stopped["metrics"] == kept
    assert stopped["best"] == outcome.result["best"]
    assert stopped["last"]["metrics"].items() >= outcome.result["last"]["metrics"].items()
    nothing = RunDirectory(str(tmp_path / "none"))
    assert result_of({"status": "stopped"}, nothing, began=0.0)["metrics"] == {}


def test_a_generators_figures_are_those_of_the_best_look(tmp_path):
    gan = {
        "model": {"kind": "gan", "noise_size": 4, "generator_hidden": [8], "discriminator_hidden": [8]},
        "data": made.features(tmp_path / "data", 300, validation_fraction=0.3).model_dump(mode="json"),
        "objective": {"kind": "adversarial"},
        "train": {"epochs": 3, "global_batch_size": 50},
    }
    outcome = cluster.train(gan, run=str(tmp_path / "run"))
    looks = lines(outcome.run, "validation")
    best = min(looks, key=lambda look: look["frechet_distance"])
    assert outcome.result["best"]["step"] == best["step"]
    assert outcome.metrics["validation/diversity"] == best["diversity"]
    assert outcome.result["last"]["metrics"]["validation/diversity"] == looks[-1]["diversity"]
    assert outcome.result["best"]["epoch"] == (best["epoch"] + 1 if best["step"] else 0)


OLD = {"metric": "validation/accuracy", "value": 0.75, "loss": 0.5, "epoch": 4, "step": 40}


def test_files_of_earlier_versions_are_read(outcome, tmp_path):
    progress = Progress.restored({"epoch": 7, "step": 56, "best": OLD})
    assert progress.best is not None
    assert progress.best["epoch"] == 5
    assert progress.best["metrics"] == {"validation/accuracy": 0.75, "validation/loss": 0.5}
    assert progress.without_better(2) == "no better for 2 epochs"
    assert progress.without_better(3) is None
    assert Progress.restored(progress.state()).best == progress.best
    saved = read_model(Folder(outcome.run))
    save_model(Folder(tmp_path), saved.weights, best=OLD, manifest=saved.manifest)
    assert read_model(Folder(tmp_path)).best == read_best(Folder(tmp_path)) == progress.best
    untrained = Progress.restored({"best": {**OLD, "epoch": 0, "step": 0}})
    assert untrained.best is not None
    assert untrained.best["epoch"] == 0


def test_a_report_of_an_earlier_version_counts_from_1_too(outcome, tmp_path):
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes(Path(outcome.run, name).read_bytes())
    old = {"status": "finished", "metrics": {"test/accuracy": 0.5}, "best": OLD}
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert ", epoch 5<" in Path(write_report(str(tmp_path))).read_text().replace("\n", "")


def test_a_trials_value_is_that_of_the_weights_it_keeps(tmp_path):
    content = worsening(tmp_path / "data")
    del content["changes"]
    space = {"optimizer.lr": {"grid": [0.1]}}
    content["sweep"] = {"space": space, "searcher": "grid", "metric": "validation/loss"}
    recipe = load_recipe(content)
    directory = SweepDirectory(str(tmp_path / "sweep"))
    directory.begin(recipe, {})
    assert recipe.sweep is not None
    manifest = prepared(recipe.data).manifest
    roster = Roster(recipe, Space(recipe.sweep), target(recipe, manifest), directory, OpenData())
    roster.state.records.append(TrialRecord(0, {"optimizer.lr": 0.1}))
    epochs = [(0.7, 0.9), (0.9, 0.6), (0.9, 0.5), (0.8, 0.1)]  # the weights with the best accuracy are kept
    for epoch, (accuracy, loss) in enumerate(epochs, 1):
        metrics = {"validation/accuracy": accuracy, "validation/loss": loss, "train/loss": loss}
        roster.on_epoch(0, {"epoch": epoch, **metrics})
    (record,) = roster.state.records
    assert (record.value, record.metrics["validation/accuracy"], record.epochs) == (0.5, 0.9, 4)
    run = RunDirectory(directory.trial(0))
    run.write_start(recipe.model_copy(update={"sweep": None}), {})
    kept = {"validation/accuracy": 0.9, "validation/loss": 0.5, "test/accuracy": 0.8, "test/loss": None}
    run.write_result({"status": "stopped", "metrics": kept, "checkpoint": None, "last": {"metrics": metrics}})
    roster.on_end(0, "pruned", None)  # one that was concluded, and so tested
    assert (record.status, record.value, record.metrics["test/accuracy"]) == ("pruned", 0.5, 0.8)
    assert directory.records()[0].metrics == record.metrics == {k: v for k, v in kept.items() if v is not None}
