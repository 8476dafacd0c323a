"""Tracking: what trackers are told of a run, and that none of them can stop, delay or end it."""

import json
import logging
import threading
from pathlib import Path
from typing import ClassVar

import pytest

import cluster
from cluster.errors import RunFailed
from cluster.recipe.loading import load_recipe
from cluster.runs.tracking import tracking
from cluster.runs.tracking.tracker import Tracker
from cluster.runs.tracking.tracking import TRACKERS, Tracking, parameters, tracked_before
from cluster.training.run_directory import read_metrics, scalars_of
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from cluster.tuning.tracked import track_trials
from nn_models.errors import UserError
from tests.unit.event_files import events

QUICK = {"train.epochs": 2, "train.log_every_steps": 5}


class Heard(Tracker):
    """Keeps what it is told; goes wrong where it is asked to."""

    name = "heard"
    wrong: ClassVar[dict[str, BaseException]] = {}

    def __init__(self) -> None:
        self.lines, self.ended, self.files = [], None, {}
        Heard.last = self

    def begin(self, begun):
        self._perhaps("begin")
        self.begun = begun
        return "a-name"

    def log(self, step, metrics):
        self._perhaps("log")
        self.lines.append((step, metrics))

    def end(self, ended):
        self._perhaps("end")
        self.ended = ended
        self.files = {name: path.read_bytes() for name, path in ended.files.items()}

    @property
    def where(self):
        return "here"

    def _perhaps(self, place):
        if place in self.wrong:
            raise self.wrong[place]


@pytest.fixture
def heard(monkeypatch):
    """The tracker of the last run."""
    monkeypatch.setitem(TRACKERS, "heard", Heard)
    monkeypatch.setattr(Heard, "wrong", {})
    return lambda: Heard.last


def tracked(run: Path, recipe="digits-mlp", **options) -> Tracking:
    """Train with the tracker of these tests."""
    resolved = load_recipe(recipe, options.pop("overrides", QUICK))
    with Tracking(["heard"], resolved, str(run)) as told:
        cluster.train(resolved, run=str(run), listener=told, **options)
    return told


def test_a_run_is_told_whole(tmp_path, heard):
    told = tracked(tmp_path / "run")
    tracker = heard()
    assert told.where == {"heard": "here"}
    assert tracker.begun.name == "run"
    assert tracker.begun.known is None
    assert tracker.begun.parameters["optimizer.lr"] == 0.003
    assert tracker.begun.parameters["model.hidden"] == "[128]"
    from cluster.training.run_directory import RunDirectory

    lines = read_metrics(RunDirectory(str(tmp_path / "run")))
    assert tracker.lines == [(line["step"], scalars_of(line)) for line in lines]
    assert any("train_interval/loss" in metrics for _, metrics in tracker.lines)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert tracker.ended.status == "finished"
    assert tracker.ended.metrics == result["metrics"]
    names = {"recipe.yaml", "environment.json", "result.json", "model/recipe.yaml", "model/model.safetensors"}
    assert set(tracker.files) == names
    for name, content in tracker.files.items():
        assert content == (tmp_path / "run" / name).read_bytes()


def test_a_run_that_goes_on_is_the_same_one_there(tmp_path, heard):
    tracked(tmp_path / "run", overrides={**QUICK, "train.epochs": 1})
    before = len(heard().lines)
    # without it the run has not ended: it goes on from its last checkpoint
    (tmp_path / "run" / "result.json").unlink()
    tracked(tmp_path / "run", overrides={**QUICK, "train.epochs": 1}, resume=True)
    assert heard().begun.known == "a-name"
    assert tracked_before(str(tmp_path / "run")) == ("heard",)
    assert tracked_before(str(tmp_path / "other")) == ()
    assert 0 < len(heard().lines) < before  # what follows the checkpoint


def test_a_run_that_never_begins_is_nowhere(tmp_path, heard):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    with pytest.raises(UserError, match="not an empty directory"):
        tracked(tmp_path / "run")
    assert not heard().lines
    assert heard().ended is None


def test_a_run_that_fails_is_told_as_failed(tmp_path, heard):
    model = {"kind": "custom", "target": "tests.unit.nets:NaNLoss", "arguments": {"step": 12}}
    with pytest.raises(RunFailed):
        tracked(tmp_path / "run", {"model": model, "data": {"kind": "digits"}})
    assert heard().lines
    assert heard().ended.status == "failed"


@pytest.mark.parametrize("place", ["begin", "log", "end"])
@pytest.mark.parametrize("error", [RuntimeError("no\nserver"), SystemExit(3)], ids=["error", "exit"])
def test_a_tracker_that_fails_says_so_once(tmp_path, heard, caplog, place, error):
    Heard.wrong[place] = error
    with caplog.at_level(logging.WARNING, "cluster.runs.tracking"):
        told = tracked(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    (warning,) = [record.getMessage() for record in caplog.records if "tracked" in record.getMessage()]
    assert warning.startswith("the run is no longer tracked by heard (")
    assert "\n" not in warning
    assert told.where == {}


def test_a_tracker_that_does_not_answer_is_not_waited_for(tmp_path, heard, caplog, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
    monkeypatch.setattr(Heard, "log", lambda self, step, metrics: answer.wait(600) and None)
    try:
        with caplog.at_level(logging.WARNING, "cluster.runs.tracking"):
            told = tracked(tmp_path / "run")
        assert "has not answered for" in caplog.text
        assert told.where == {}
    finally:
        answer.set()


def test_an_unknown_or_missing_tracker_is_refused_before_anything(tmp_path, monkeypatch):
    recipe = load_recipe("digits-mlp")
    with pytest.raises(UserError, match="'mlfow' is no tracker; did you mean mlflow"):
        Tracking(["mlfow"], recipe, str(tmp_path))
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        Tracking(["wandb"], recipe, str(tmp_path))
    assert str(caught.value) == "--track: wandb needs wandb, not installed here; pip install 'manta-train[wandb]'"


def test_parameters_are_plain_values_by_dotted_path():
    found = parameters(load_recipe("digits-mlp", {"train.clip_norm": None}))
    assert found["model.kind"] == "mlp"
    assert found["train.compile"] is False
    assert found["train.clip_norm"] == "null"
    assert not any(name.startswith("sweep") for name in found)
    assert all(isinstance(value, str | int | float | bool) for value in found.values())


def test_tensorboards_parameters_and_figures_stand_beside_the_curves(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    recipe, run = load_recipe("digits-mlp", QUICK), tmp_path / "run"
    for resume in (False, True):
        with Tracking(["tensorboard"], recipe, str(run)) as told:
            cluster.train(recipe, run=str(run), listener=told, resume=resume)
        (run / "result.json").unlink()
    assert told.where == {"tensorboard": f"tensorboard --logdir {run}"}
    (file,) = run.glob("events/*.hparams")  # one, although the run has ended twice
    summaries = [value for event in events(file) for value in event.summary.value]
    (begun,) = [value for value in summaries if value.tag == "_hparams_/session_start_info"]
    data = HParamsPluginData.FromString(begun.metadata.plugin_data.content)
    assert data.session_start_info.hparams["optimizer.lr"].number_value == 0.003
    (described,) = [value for value in summaries if value.tag == "_hparams_/experiment"]
    tags = {
        info.name.tag
        for info in HParamsPluginData.FromString(described.metadata.plugin_data.content).experiment.metric_infos
    }
    assert "test/accuracy" in tags
    (words,) = [value for value in summaries if value.tag.startswith("recipe")]
    assert b"kind: mlp" in words.tensor.string_val[0]


def test_each_trial_of_a_sweep_is_a_run_of_its_own(tmp_path, heard, monkeypatch):
    every = []
    monkeypatch.setattr(Heard, "begin", lambda self, begun: (every.append(self), setattr(self, "begun", begun)) and "a")
    sweep = made_sweep(tmp_path / "sweep")
    assert track_trials(["heard"], sweep) == {"heard": "here"}
    assert [tracker.begun.name for tracker in every] == ["sweep-0000", "sweep-0001", "sweep-0002"]
    assert [tracker.begun.parameters["optimizer.lr"] for tracker in every] == [0.1, 0.2, 0.3]
    assert [tracker.ended.status for tracker in every] == ["finished", "stopped", "failed"]
    assert [tracker.ended.metrics for tracker in every] == [{"validation/loss": 0.5}] * 3
    assert [tracker.lines for tracker in every] == [[(4, {"validation/loss": 0.5})]] * 3
    assert track_trials(["heard"], sweep) == {}  # of a sweep that goes on, the new ones
    assert len(every) == 3


def test_a_tracker_that_fails_at_one_trial_is_told_of_no_other(tmp_path, heard, caplog):
    Heard.wrong["log"] = RuntimeError("no server")
    with caplog.at_level(logging.WARNING, "cluster.runs.tracking"):
        assert track_trials(["heard"], made_sweep(tmp_path / "sweep")) == {}
    assert len(caplog.records) == 1


def made_sweep(folder: Path) -> SweepDirectory:
    """A sweep whose trials have ended in each way; one of them never began."""
    directory = SweepDirectory(str(folder))
    directory.begin(load_recipe("digits-mlp"), {})
    line = {"step": 4, "epoch": 0, "split": "validation", "loss": 0.5, "time_s": 1.0}
    for index, status in enumerate(("finished", "pruned", "failed", "invalid")):
        record = TrialRecord(index, {"optimizer.lr": (index + 1) / 10}, status, metrics={"validation/loss": 0.5})
        directory.write(record)
        if status != "invalid":
            directory.trial(index).write_text("metrics.jsonl", json.dumps(line) + "\n")
    return directory
