"""Leaving: training that shall go on elsewhere stops at a checkpoint, after a step that all ranks have agreed on."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Leaves = Callable[[int], bool]  # whether training stops where so many steps are done


class Left(Exception):
    """Training has stopped, and its newest checkpoint has all of it."""

    def __init__(self, step: int) -> None:
        super().__init__(f"saved after step {step}")
        self.step = step


class Leaving:
    """One rank's part in the agreement. The loop asks `leaves`; a thread that hears of the others asks the rest.

    A rank that has been told holds at the end of the step that it is in, and the last of these steps is where all stop:
    nobody has gone past it, and whoever holds at an earlier one goes on to it. The other thread says where a rank
    holds, for the loop itself may be in a collective, waiting for a rank that holds already.
    """

    def __init__(self) -> None:
        self._lock, self._agreed = threading.Lock(), threading.Event()
        self._step = -1
        self._hold: int | None = None
        self._last: int | None = None

    def leaves(self, step: int) -> bool:
        """Whether training stops where so many steps are done. Waits for nothing, but for the others' answers."""
        with self._lock:
            self._step = step
            if self._hold is None or step < self._hold:
                return False
        self._agreed.wait()
        return self._last is not None and step >= self._last

    def hold(self) -> int:
        """Take no step past the one returned before all have agreed."""
        with self._lock:
            if self._hold is None:
                self._hold = self._step + 1
            return self._hold

    def agree(self, step: int) -> None:
        """All stop once so many steps are done."""
        self._last = step
        self._agreed.set()


def never(step: int) -> bool:
    """Of training that nobody moves elsewhere."""
    return False


def once_on_sigterm(told: Callable[[], object]) -> None:
    """Call this at the first SIGTERM; a second one does what it did before. For the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        told()

    signal.signal(signal.SIGTERM, note)


@contextmanager
def saved_on_sigterm() -> Iterator[Leaves]:
    """Let SIGTERM wait, while training in this process goes on in the block, until the step it is in has been saved.

    Then, and at once where a second one comes, it does what it did before; to be ignored is left to it. Only the main
    thread is told of signals: elsewhere nothing is different.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    if before in (None, signal.SIG_IGN):
        yield never
        return
    told = threading.Event()
    once_on_sigterm(told.set)
    try:
        yield lambda step: told.is_set()
    except Left as left:
        logger.info("SIGTERM: %s", left)
        signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt from None  # whoever handles it has returned
    finally:
        signal.signal(signal.SIGTERM, before)
