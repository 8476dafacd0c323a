"""Trials as Ray Tune's processes run them, in this process and without Ray: what they report, and what they leave."""

import copy
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.adversarial.players import LocalPlayers, PlayersLost
from cluster.adversarial.quality import Quality
from cluster.data.prepare import prepared
from cluster.errors import RunFailed
from cluster.recipe.loading import load_recipe
from cluster.recipe.sweep import SweepSpec
from cluster.runs.admission import workers_of
from cluster.training.run_directory import RunDirectory, read_metrics
from cluster.tuning import tune
from cluster.tuning.fused.loop import FusedLoop
from cluster.tuning.fused.pruning import Pruning, PruningRule
from cluster.tuning.fused.trial import FusedTrial
from cluster.tuning.messages import CONFIG, FusedConfig, TrialConfig, Where
from cluster.tuning.trials import EpochTrial, World
from nn_models.errors import UserError
from tests.unit import made

GAN: dict[str, Any] = {
    "name": "tiny",
    "model": {"kind": "dcgan", "width": 8, "noise_size": 16},
    "data": {"kind": "digits"},
    "objective": {"kind": "adversarial"},
    "optimizer": {"kind": "adam", "lr": 2e-4, "betas": [0.5, 0.999]},
    "train": {"global_batch_size": 600, "epochs": 5},
    "adversarial": {"quality": {"every_epochs": 2}},
}
TRAINED = {"train/generator_loss", "train/discriminator_loss", "train/real_accuracy", "train/fake_accuracy"}
LOOKS = ("diversity", "frechet_distance", "kernel_distance", "frechet_floor", "kernel_floor")
SEEN = TRAINED | {f"validation/{name}" for name in LOOKS}
TESTED = SEEN | {f"test/{name}" for name in LOOKS}


def trial_of(recipe: dict[str, Any], run: Path, *, num_workers: int = 0) -> EpochTrial:
    """One of a sweep's trials, as a process of Tune's makes it."""
    parsed = load_recipe(recipe)
    data = prepared(parsed.data)
    workers = workers_of(parsed, 0, False, alone=False)
    world = World(data={}, workers=workers, num_workers=num_workers, environment={"seed": 0}, embedded=True, path=[])
    config = TrialConfig(3, {}, parsed, str(run), Where(data.folder.uri, None))

    class Trial(EpochTrial):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config, world)

    return Trial({CONFIG: config})


def reports(trial: EpochTrial) -> list[dict[str, Any]]:
    """All that it reports."""
    found = [trial.step()]
    while not found[-1].get("done"):
        found.append(trial.step())
    trial.cleanup()
    return found


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in report.items() if "/" in name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    return reports(trial_of(GAN, run, num_workers=2)), RunDirectory(str(run))


def test_a_gan_reports_the_epochs_that_it_was_looked_at(whole):
    told, run = whole
    assert [report["epoch"] for report in told] == [2, 4, 5]
    assert [set(metrics_of(report)) for report in told] == [SEEN, SEEN, TESTED]
    assert [report.get("outcome") for report in told] == [None, None, "finished"]
    lines = read_metrics(run)
    for report in told[:2]:
        last = {line["split"]: line for line in lines if line["epoch"] == report["epoch"] - 1}
        named = {f"{split}/{name}": value for split, line in last.items() for name, value in line.items()}
        assert named.items() >= metrics_of(report).items()
    result = run.result()
    assert result is not None
    tested = {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    assert result["last"]["metrics"] | tested == metrics_of(told[-1])
    assert (result["status"], result["epochs"], result["restarts"], result["num_workers"]) == ("finished", 5, 0, 2)
    assert result["wall_s"] > result["time_to_first_step_s"] > 0
    facts = run.folder.read_json("environment.json")
    assert facts.pop("data")["rows"] == "1258 rows of 1 x 8 x 8 with 10 outputs"
    assert facts == {"seed": 0, "device": "cpu"}


def lose(monkeypatch: pytest.MonkeyPatch, *segments: int) -> None:
    """The halves' processes die in these segments, which are epochs here."""
    play, played = LocalPlayers.play, []

    def losing(self: LocalPlayers, *place: Any) -> Any:
        played.append(place)
        if len(played) in segments:
            raise PlayersLost("the process of a half has died")
        return play(self, *place)

    monkeypatch.setattr(LocalPlayers, "play", losing)


def test_epochs_that_are_played_again_are_reported_once(whole, tmp_path, monkeypatch):
    changes = GAN["train"] | {"checkpoint_every_epochs": 3}
    lose(monkeypatch, 3, 8)  # in epoch 3, then in epoch 5: on from the start, then from the end of epoch 3
    told = reports(trial_of({**GAN, "train": changes}, tmp_path / "run"))
    assert [(report["epoch"], metrics_of(report)) for report in told] == [
        (report["epoch"], metrics_of(report)) for report in whole[0]
    ]
    result = RunDirectory(str(tmp_path / "run")).result()
    assert result is not None
    assert result["restarts"] == 2


def test_a_gan_that_fails_says_so_and_goes_on_when_it_is_started_again(whole, tmp_path, monkeypatch):
    recipe = {**GAN, "train": GAN["train"] | {"max_failures": 0}}
    with monkeypatch.context() as patch:
        lose(patch, 4)
        trial = trial_of(recipe, tmp_path / "run", num_workers=1)
        trial.step()
        with pytest.raises(RunFailed, match=r"train\.max_failures allows"):  # Tune starts it again
            trial.step()
        trial.cleanup()
    run = RunDirectory(str(tmp_path / "run"))
    result = run.result()
    assert result is not None
    assert (result["status"], result["num_workers"]) == ("failed", 1)
    assert "train.max_failures allows" in result["error"]
    assert result["metrics"]["validation/frechet_distance"] == whole[0][0]["validation/frechet_distance"]
    again = trial_of(recipe, tmp_path / "run", num_workers=1)
    told = again.step()
    assert run.result() is None  # the failure was not the end
    told = [told, *reports(again)]
    assert [(report["epoch"], metrics_of(report)) for report in told] == [
        (report["epoch"], metrics_of(report)) for report in whole[0][1:]
    ]
    assert RunDirectory(str(tmp_path / "run")).result()["status"] == "finished"  # type: ignore[index]


def test_a_gan_that_would_only_fail_again_ends(tmp_path, monkeypatch):
    def refuse(*_: Any) -> Any:
        raise UserError("here", "wrong", "mend it")

    monkeypatch.setattr(LocalPlayers, "play", refuse)
    (report,) = reports(trial_of(GAN, tmp_path / "run"))
    assert report == {"epoch": 0, "outcome": "failed", "error": "here: wrong; mend it", "done": True}
    result = RunDirectory(str(tmp_path / "run")).result()
    assert result is not None
    assert (result["status"], result["error"]) == ("failed", "here: wrong; mend it")


def test_metrics_that_are_not_finite_are_not_reported(tmp_path, monkeypatch):
    distances = iter([50.0, math.nan, 30.0, 20.0, 10.0])
    monkeypatch.setattr(Quality, "measure", lambda *_: {"diversity": 1.0, "frechet_distance": next(distances)})
    told = reports(trial_of(GAN, tmp_path / "run"))
    assert [report["epoch"] for report in told] == [2, 4, 5]
    assert ["validation/frechet_distance" in report for report in told] == [False, True, True]
    assert all("validation/diversity" in report for report in told)


def test_a_gan_that_is_pruned_leaves_its_checkpoints(tmp_path):
    trial = trial_of(GAN, tmp_path / "run")
    trial.step()
    trial.cleanup()
    run = RunDirectory(str(tmp_path / "run"))
    assert run.result() is None  # the sweep says how it ended
    assert any(name.startswith("step-") for name in (run.folder / "checkpoints").names())


@pytest.mark.parametrize("validation_fraction", [0.2, 0])
def test_the_loop_reports_every_epoch(validation_fraction, tmp_path):
    spec = made.features(tmp_path / "source", 60, validation_fraction=validation_fraction)
    recipe = {
        "model": {"kind": "mlp", "hidden": []},
        "data": spec.model_dump(mode="json"),
        "train": {"epochs": 3, "global_batch_size": 20},
    }
    told = reports(trial_of(recipe, tmp_path / "run"))
    assert [report["epoch"] for report in told] == [1, 2, 3]
    splits = {"train", "validation"} if validation_fraction else {"train"}
    assert [{name.split("/")[0] for name in metrics_of(report)} for report in told] == [
        splits,
        splits,
        splits | {"test"},
    ]
    result = RunDirectory(str(tmp_path / "run")).result()
    assert result is not None
    assert (result["status"], result["num_workers"], result["restarts"]) == ("finished", 0, 0)


def test_configurations_travel():
    recipe = load_recipe(GAN)
    member = TrialConfig(3, {"optimizer.lr": 0.1}, recipe, "runs/3", Where("data", None))
    rule = PruningRule("asha", "validation/loss", "min", (1, 3), 3, 1)
    group = FusedConfig((member, TrialConfig(5, {}, recipe, "runs/5", Where("data", None))), rule)
    for config in (member, group):
        assert pickle.loads(pickle.dumps(config)) == config
        assert copy.deepcopy({CONFIG: config}) == {CONFIG: config}
    assert (member.indices, group.indices, group.index) == ((3,), (3, 5), 3)
    assert group.where == member.where


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_trial_that_failed_is_compared_with_none(scheduler):
    spec = SweepSpec(space={"optimizer.lr": {"uniform": [0.1, 1]}}, scheduler=scheduler)
    metric = "validation/loss"
    tunes = tune.scheduler_of(spec, 9, metric=metric, mode="min", past={}, mutate=lambda trial, *_: trial)
    running: Any = SimpleNamespace(get_live_trials=list)
    trials = [tune.tune.experiment.Trial("trial", stub=True) for _ in range(5)]
    for trial in trials:
        tunes.on_trial_add(running, trial)
        assert tunes.on_trial_result(running, trial, {"epoch": 1, metric: 1.0}) == "CONTINUE"
    tunes.on_trial_complete(running, trials[0], {"epoch": 2, "outcome": "failed", "error": "no memory", "done": True})
    for trial in trials[1:]:
        assert tunes.on_trial_result(running, trial, {"epoch": 2, metric: 1.0}) == "CONTINUE"


# -- fused trials ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> dict[str, Any]:
    spec = made.features(tmp_path_factory.mktemp("source"), 100, validation_fraction=0.3)
    return {
        "model": {"kind": "mlp", "hidden": []},
        "data": spec.model_dump(mode="json"),
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "train": {"epochs": 6, "global_batch_size": 20},
    }


def group_of(recipe: dict[str, Any], folder: Path, scheduler: Any, members: Sequence[int] = range(6)) -> FusedTrial:
    """Trials that train together, each with another learning rate."""
    recipes = [load_recipe(recipe, {"optimizer.lr": 1e-4 * 8**number}) for number in range(6)]
    data = prepared(recipes[0].data)
    world = World(
        data={},
        workers=workers_of(recipes[0], 1, False, alone=False),
        num_workers=0,
        environment={},
        embedded=True,
        path=[],
    )
    where = Where(data.folder.uri, None)
    trials = tuple(TrialConfig(number, {}, recipes[number], str(folder / str(number)), where) for number in members)
    rule = PruningRule(scheduler, "validation/loss", "min", (1, 2, 4), 2, 2)

    class Trial(FusedTrial):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config, world)

    return Trial({CONFIG: FusedConfig(trials, rule)})


def all_ended(trial: FusedTrial) -> dict[int, tuple[str, float]]:
    """Each trial's status and last epoch, once all have ended."""
    found: dict[int, tuple[str, float]] = {}
    told = reports(trial)  # type: ignore[arg-type]  # a Trial as well
    for report in told:
        for index, (status, _) in report["left"].items():
            found[index] = status, report["members"][index]["epoch"]
    return found


class Killed(BaseException):
    """The process dies here."""


def die(patch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """In this call of the method, the first is 1, before it has done anything."""
    method, calls = getattr(owner, name), []

    def dying(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return method(self, *arguments)

    patch.setattr(owner, name, dying)


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_group_that_dies_at_any_time_is_pruned_as_if_it_had_not(scheduler, linear, tmp_path):
    expected = all_ended(group_of(linear, tmp_path / "whole", scheduler))
    assert 1 < sum(status == "pruned" for status, _ in expected.values()) < 6
    places = [
        *((FusedLoop, "epoch", call) for call in (2, 3, 5)),
        *((Pruning, "losers", call) for call in (1, 2, 4)),
        *((FusedLoop, "stop", call) for call in (1, 2, 3, 4, 5)),
        *((RunDirectory, "write_result", call) for call in (1, 2, 3, 4, 5)),
    ]
    for owner, name, call in places:
        folder = tmp_path / f"{name}{call}"
        with pytest.MonkeyPatch.context() as patch:
            die(patch, owner, name, call)
            trial = group_of(linear, folder, scheduler)
            with pytest.raises(Killed):
                reports(trial)  # type: ignore[arg-type]  # a Trial as well
            trial.cleanup()
        assert all_ended(group_of(linear, folder, scheduler)) == expected, (name, call)


def test_those_that_are_left_of_a_group_are_not_pruned_once_more(linear, tmp_path):
    expected = all_ended(group_of(linear, tmp_path / "whole", "asha"))
    trial = group_of(linear, tmp_path / "run", "asha")
    left = trial.step()["left"]
    trial.cleanup()
    assert 0 < len(left) < 6
    rest = [number for number in range(6) if number not in left]  # the sweep has heard of the others
    assert all_ended(group_of(linear, tmp_path / "run", "asha", rest)) == {n: expected[n] for n in rest}
