"""How ranks tell each other that they leave, over notes that all can read: threads stand in for their processes."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

import pytest

from cluster.training import notice
from cluster.training.leaving import Leaving
from cluster.training.notice import LEAVING, heard

LONGEST_S = 60  # a step may take next to no time


class Notes:
    """Those of a run, in memory. The first few times they cannot be had."""

    def __init__(self, num_failures: int = 0) -> None:
        self.content: dict[str, Any] = {}
        self._failures = [OSError("the GCS does not answer")] * num_failures
        self._lock = threading.Lock()

    def read(self, name: str) -> Any:
        with self._lock:
            if self._failures:
                raise self._failures.pop()
            return self.content.get(name)

    def write(self, name: str, content: Any) -> None:
        with self._lock:
            self.content[name] = content


class Rank(threading.Thread):
    """A loop whose every step ends in a collective."""

    def __init__(self, rank: int, together: threading.Barrier, leaving: Leaving) -> None:
        super().__init__(daemon=True)
        self.rank, self._together, self._leaving = rank, together, leaving
        self.left: int | None = None

    def run(self) -> None:
        last = time.monotonic() + LONGEST_S
        for step in count():
            if time.monotonic() > last:
                return
            if self._leaving.leaves(step):
                self.left = step
                return
            self._together.wait(60)


@pytest.fixture
def warned(monkeypatch) -> Iterator[dict[int, str]]:
    """Why which rank is told to go; what these ranks would be told by Ray or by a signal."""
    found: dict[int, str] = {}
    monkeypatch.setattr(notice._Hearing, "_own_reason", lambda self: found.get(self._rank))
    monkeypatch.setattr(notice, "POLL_S", 0.02)
    notice._woken.clear()
    yield found
    notice._woken.clear()


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("told", ["first", "last", "all"])
@pytest.mark.parametrize("num_failures", [0, 3])
def test_all_ranks_leave_at_one_step(warned, world_size, told, num_failures):
    notes, together = Notes(num_failures), threading.Barrier(world_size)
    begun = threading.Event()
    with ExitStack() as stack:
        ranks = []
        for rank in range(world_size):
            leaving = Leaving()
            place = {"group": "group 1", "rank": rank, "world_size": world_size}
            stack.enter_context(heard(leaving, notes, **place))  # type: ignore[arg-type]
            ranks.append(Rank(rank, together, leaving))
        for rank in ranks:
            rank.start()
        begun.wait(0.05)
        chosen = {"first": [0], "last": [world_size - 1], "all": range(world_size)}[told]
        warned.update({rank: f"worker {rank} was told to end" for rank in chosen})
        for rank in ranks:
            rank.join(60)
    left = {rank.left for rank in ranks}
    assert len(left) == 1
    assert left == {notes.content["group 1/last"]}
    assert notes.content[LEAVING] in warned.values()


def test_a_note_of_the_drivers_is_heard(warned):
    notes, leaving = Notes(), Leaving()
    notes.write(LEAVING, "the driver's node is drained")
    with heard(leaving, notes, group="group 1", rank=0, world_size=1):  # type: ignore[arg-type]
        rank = Rank(0, threading.Barrier(1), leaving)
        rank.start()
        rank.join(60)
    assert rank.left is not None


def test_nothing_is_left_of_a_run_that_ends_by_itself(warned):
    before = threading.active_count()
    with heard(Leaving(), Notes(), group="group 1", rank=0, world_size=2):  # type: ignore[arg-type]
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
