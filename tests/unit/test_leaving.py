"""Training that stops between two steps, to go on elsewhere: how ranks agree where, and that nothing shows of it."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from cluster.training.context import LocalContext
from cluster.training.leaving import Leaving, Left, saved_on_sigterm
from cluster.training.loop import fit
from cluster.training.splits import open_splits
from cluster.training.step import Step

WEIGHTS = "model/model.safetensors"
# dropout and momentum carry state; lines of metrics, and the sums of an epoch, come from seven steps each
RECIPE: dict[str, Any] = {
    "name": "moved",
    "model": {"kind": "mlp", "hidden": [16], "dropout": 0.2},
    "data": {"kind": "digits"},
    "train": {"epochs": 3, "global_batch_size": 100, "log_every_steps": 7, "ema_decay": 0.9},
}


# -- the agreement -----------------------------------------------------------------------------------------------------


@given(
    at=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    told=st.lists(st.integers(0, 20), min_size=5, max_size=5),
)
@settings(max_examples=200)
def test_all_ranks_stop_at_one_step_that_none_has_gone_past(at, told):
    """Ranks are told at any moment; votes are said by another thread than the loop's, so none is waited for."""
    ranks = [Leaving() for _ in at]
    for rank, step in zip(ranks, at, strict=True):
        for passed in range(step + 1):
            assert not rank.leaves(passed)
    last = max(rank.hold() for rank in ranks)
    assert last == max(at) + 1
    for rank in ranks:
        rank.agree(last)
    for rank, step in zip(ranks, at, strict=True):
        assert [passed for passed in range(step + 1, last + 1) if rank.leaves(passed)] == [last]


def test_a_rank_waits_at_its_step_for_the_others_answers():
    rank, answers = Leaving(), []
    assert not rank.leaves(4)
    assert rank.hold() == rank.hold() == 5
    loop = threading.Thread(target=lambda: answers.extend(rank.leaves(step) for step in (5, 6)))
    loop.start()
    loop.join(0.1)
    assert loop.is_alive()
    rank.agree(6)
    loop.join(10)
    assert answers == [False, True]


def test_a_rank_that_has_not_begun_holds_at_its_first_step():
    rank = Leaving()
    assert rank.hold() == 0
    rank.agree(0)
    assert rank.leaves(40)


# -- the loop ----------------------------------------------------------------------------------------------------------


def trained(recipe: dict[str, Any], run: Path, *, stops: tuple[int, ...] = ()) -> dict[str, Any]:
    """The result of a run in this process that is moved once so many steps are done, at each of these."""
    resolved = load_recipe(recipe)
    splits = open_splits(prepared(resolved.data), window=resolved.data.shuffle_window)
    left, began = list(stops), time.time()
    for start in range(len(stops) + 1):
        context = LocalContext(
            run=Folder(run).create(),
            splits=splits,
            device=torch.device("cpu"),
            leaves=lambda step: bool(left) and step == left[0],
        )
        try:
            return fit(resolved, context=context, since=began if start else None)
        except Left as stopped:
            found = (stopped.step, Checkpoints(context.run / "checkpoints", keep=2).newest_step())
        step = left.pop(0)
        assert found == (step, step)
    raise AssertionError


def lines(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, but for times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time_s", "rows_per_s")} for line in found]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, trained(RECIPE, run)


@pytest.mark.parametrize("stops", [(1,), (10,), (14,), (15, 16, 30), (0,), (43, 44)])
def test_a_run_that_is_moved_comes_to_the_same_figures(undisturbed, tmp_path, stops):
    """Within an interval, at its end, at an epoch's end (15 steps), before the first step and the last."""
    run, whole = undisturbed
    result = trained(RECIPE, tmp_path / "run", stops=stops)
    assert lines(tmp_path / "run") == lines(run)
    assert result["metrics"] == whole["metrics"]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()


def test_what_is_lost_is_the_time_from_the_checkpoint_to_the_next_step(undisturbed, tmp_path):
    _, whole = undisturbed
    began = time.time()
    result = trained(RECIPE, tmp_path / "run", stops=(5, 10))
    assert whole["lost_s"] == 0
    assert 0 < result["lost_s"] < time.time() - began
    state = Checkpoints(Folder(tmp_path / "run" / "checkpoints"), keep=2).newest()
    assert state is not None
    # the first step is that of the first start: what is lost lies after it
    assert began < result["first_step_at"] == state["progress"]["first_step_at"] < time.time() - result["lost_s"]


# -- SIGTERM to a run in this process ----------------------------------------------------------------------------------


class Told(KeyboardInterrupt):
    pass


def tell(number: int, frame: object) -> None:
    raise Told


@pytest.fixture
def handled():
    before = signal.signal(signal.SIGTERM, tell)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_waits_until_the_step_is_saved(handled):
    answers = []

    def work() -> None:
        with saved_on_sigterm() as leaves:
            answers.append(leaves(1))
            os.kill(os.getpid(), signal.SIGTERM)
            answers.append(leaves(2))
            raise Left(2)

    with pytest.raises(Told):
        work()
    assert answers == [False, True]
    assert signal.getsignal(signal.SIGTERM) is tell


def test_a_second_sigterm_does_not_wait(handled):
    def work() -> None:
        with saved_on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Told):
        work()


def test_training_that_ends_first_is_not_stopped(handled):
    with saved_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is tell


def test_a_thread_is_told_of_no_signals(handled):
    found = []

    def look() -> None:
        with saved_on_sigterm() as leaves:
            found.append((leaves(1), signal.getsignal(signal.SIGTERM) is tell))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_a_run_in_this_process_is_saved_and_goes_on_to_the_same_figures(undisturbed, handled, tmp_path):
    whole, _ = undisturbed
    run, steps, undisturbed_step = tmp_path / "run", [], Step.__call__

    def step(self: Step, *arguments: Any, **named: Any) -> None:
        steps.append(1)
        if len(steps) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        undisturbed_step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        with pytest.raises(Told):
            cluster.train(RECIPE, run=str(run))
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], len(steps)) == ("stopped", 11)
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["step-0000000011.pt"]
    outcome = cluster.train(RECIPE, run=str(run), resume=True)
    assert (outcome.result["restarts"], outcome.result["preemptions"], outcome.result["lost_s"]) == (0, 0, 0.0)
    assert lines(run) == lines(whole)
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
