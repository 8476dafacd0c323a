"""A worker dies while its group starts, or a group has no room: the next group gets the room, as soon as there is."""

from functools import partial
from typing import Any

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError

import cluster
from cluster.training import ray_train, starting
from cluster.training.starting import PATIENCE_S, Patient
from tests.ray.conftest import EXACT
from tests.ray.starts import DyingConfig

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def test_a_group_that_lost_a_worker_at_its_start_leaves_its_room_to_the_next(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_train, "NodesConfig", partial(DyingConfig, died=str(tmp_path / "died")))
    half = {"train.cpus_per_worker": ray.cluster_resources()["CPU"] // 2}  # there is no room for two groups
    outcome = cluster.train(EXACT, num_workers=2, run=str(tmp_path / "run"), overrides=half)
    assert (tmp_path / "died").exists()
    assert (outcome.status, outcome.result["restarts"]) == ("finished", 0)  # none had begun to train


class Clock:
    """The time, and what was noted last."""

    def __init__(self) -> None:
        self.now, self.noted = 1000.0, None

    def monotonic(self) -> float:
        return self.now

    def write(self, name: str, content: Any) -> None:
        self.noted = content


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(starting, "time", clock)
    monkeypatch.setattr(starting, "Notes", lambda key: clock)
    return clock


def test_room_is_waited_for_and_dead_workers_are_counted(clock):
    policy = Patient(FailureConfig(max_failures=0, controller_failure_limit=1), "key")
    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    for _ in range(20):
        assert policy.make_decision(no_room) is RETRY
        clock.now += 10
    assert clock.noted == 190
    lost = ControllerError(WorkerGroupStartupFailedError("a worker died"))
    assert [policy.make_decision(lost), policy.make_decision(lost)] == [RETRY, RAISE]
    assert policy.make_decision(no_room) is RETRY  # it is another wait
    assert clock.noted == 0
    clock.now += PATIENCE_S
    assert policy.make_decision(no_room) is RAISE
    assert ray_train._explain(no_room) == "the cluster has had no room for the workers for 30 minutes"
