"""Notice: how Ray Train's workers hear that they shall go on elsewhere, and tell each other where they stop.

They are told by SIGTERM to one of them, by Ray Train's watcher of nodes that are drained (a cloud's warning before it
takes a machine back; SIGTERM to `ray start --block`, as a Kubernetes pod gets it), or by their driver. The notes of the
run carry it from one to all: no collective could, for a rank may be in one that the others come to only later.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.train.v2._internal.execution.context import get_train_context

from cluster.runtime.draining import drains
from cluster.runtime.lifeline import POLL_S
from cluster.training.leaving import Leaving, once_on_sigterm
from cluster.training.notes import Notes

logger = logging.getLogger(__name__)

LEAVING = "leaving"  # why, in words
ASKING_S = 0.02  # between looks at the others' answers

_sigterm, _woken = threading.Event(), threading.Event()


def heed_sigterm() -> None:
    """Have this worker's process take the first SIGTERM as a warning. Called in its main thread."""

    def told() -> None:
        _sigterm.set()
        _woken.set()

    once_on_sigterm(told)


@contextmanager
def heard(leaving: Leaving, notes: Notes, *, group: str, rank: int, world_size: int) -> Iterator[None]:
    """Hear of warnings while the block trains, for this rank's part; `group` is the name of these ranks alone."""
    hearing = _Hearing(leaving, notes, group, rank, world_size)
    hearing.start()
    try:
        yield
    finally:
        hearing.over = True
        _woken.set()
        hearing.join()


class _Hearing(threading.Thread):
    over = False

    def __init__(self, leaving: Leaving, notes: Notes, group: str, rank: int, world_size: int) -> None:
        super().__init__(name="notice", daemon=True)
        self._leaving, self._notes, self._group = leaving, notes, group
        self._rank, self._world_size = rank, world_size

    def run(self) -> None:
        """See Thread."""
        while not self.over:
            try:
                if self._told():
                    self._agree()
                    return
            except Exception as error:  # whatever Ray raises while its GCS does not answer
                logger.warning("no notes of the run can be read: %s", error)
                time.sleep(POLL_S)
            _woken.wait(POLL_S)

    def _told(self) -> bool:
        if reason := self._own_reason():
            self._notes.write(LEAVING, reason)
        return bool(reason or self._notes.read(LEAVING))

    def _own_reason(self) -> str | None:
        if _sigterm.is_set():
            return f"worker {self._rank} on {ray.util.get_node_ip_address()} was told to end (SIGTERM)"
        info = get_train_context().preemption_context.preemption_info
        if info is None:
            return None
        return drains(dict.fromkeys(info.preempted_node_ids, info.deadline_ms or 0))

    def _agree(self) -> None:
        self._notes.write(f"{self._group}/{self._rank}", self._leaving.hold())
        while not self.over:
            if self._rank == 0:
                holds = [self._notes.read(f"{self._group}/{rank}") for rank in range(self._world_size)]
                if None not in holds:
                    self._notes.write(f"{self._group}/last", max(holds))
            if (last := self._notes.read(f"{self._group}/last")) is not None:
                self._leaving.agree(last)
                return
            time.sleep(ASKING_S)
