"""Told: what a submitted job says of its run in its log, as lines that `manta jobs` reads and does not show.

The log is all that reaches everyone who may ask the job server: the run's directory may be on the cluster's disks.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from cluster.errors import Lost
from cluster.storage import Folder
from cluster.training.run_directory import jsonable, read_result
from nn_models.errors import UserError

PREFIX = "::manta "
TELLS = "MANTA_JOB"  # set in the environment of what `manta submit` has submitted
EVERY_S = 15.0  # between two lines about the same epoch


def tell(kind: str, **facts: Any) -> None:
    """Say so, in a job that was submitted by `manta submit`; elsewhere nothing happens."""
    if os.environ.get(TELLS):
        print(PREFIX + json.dumps(jsonable({"kind": kind, "at": time.time(), **facts})), file=sys.stderr, flush=True)


@contextmanager
def telling(verb: str, run: str, **facts: Any) -> Iterator[None]:
    """Tell that a run or sweep begins in this directory, and what its result.json says once the block has ended."""
    folder = Folder(run)
    tell("begun", verb=verb, run=folder.uri, **facts)
    before = _result(folder)
    try:
        yield
    finally:
        found = _result(folder)
        if found and (found != before or sys.exc_info()[0] is None):
            tell("ended", run=folder.uri, result=found)


def _result(folder: Folder) -> dict[str, Any] | None:
    if os.environ.get(TELLS):
        with suppress(Lost, UserError):  # whoever needs it says so
            return read_result(folder)
    return None


class Told:
    """What a log tells."""

    def __init__(self, log: str) -> None:
        self._lines = [line for line in map(_content, log.splitlines()) if line]

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest line of this kind since the run began, the last time."""
        return next((line for line in reversed(self._lines) if line["kind"] == kind), None)

    @property
    def run(self) -> str | None:
        """The directory of the job's run or sweep."""
        begun = self.last("begun")
        return None if begun is None else begun.get("run")

    @property
    def result(self) -> dict[str, Any] | None:
        """What result.json of the run says, once it has ended."""
        ended = self.last("ended")
        return None if ended is None else ended.get("result")

    def progress(self, now: float) -> dict[str, Any]:
        """How far it is: what `begun` and the newest lines say, and `left_s`, the seconds that are left, or None."""
        begun = self.last("begun") or {}
        epochs = [line for line in self._lines if line["kind"] == "epoch"]
        trials = self.last("trials")
        found: dict[str, Any] = {name: begun[name] for name in ("verb", "name", "run") if name in begun}
        if trials:
            done, all_of_them = trials["ended"], trials["num_trials"]
            found |= {name: value for name, value in trials.items() if name not in ("kind", "at")}
            here = done - trials.get("ended_before", 0)
            return found | {"left_s": _left(begun.get("at"), now, here, all_of_them - done)}
        if not epochs:
            return found | {"left_s": None}
        done = max((line["epoch"] for line in epochs if line["whole"]), default=0)
        metrics: dict[str, float] = {}
        for line in epochs:
            metrics |= line["metrics"]
        first = min(line["epoch"] for line in epochs) - 1  # of a run that goes on
        found |= {"epoch": epochs[-1]["epoch"], "epochs": epochs[-1]["epochs"], "step": epochs[-1]["step"]}
        found |= {"metrics": metrics}
        last = max((line["at"] for line in epochs if line["whole"]), default=None)
        left = _left(begun.get("at"), last or now, done - first, epochs[-1]["epochs"] - done)
        return found | {"left_s": None if left is None else max(0.0, left - (now - (last or now)))}


def _left(began: float | None, now: float, done: int, to_do: int) -> float | None:
    """Seconds that the rest takes if it goes on as so far."""
    return (now - began) / done * to_do if began and done > 0 else None


def is_told(line: str) -> bool:
    """Whether a line of a log is not for people."""
    return line.startswith(PREFIX)


def _content(line: str) -> Mapping[str, Any] | None:
    if not is_told(line):
        return None
    try:
        content = json.loads(line.removeprefix(PREFIX))
    except ValueError:  # cut short
        return None
    return content if isinstance(content, dict) and "kind" in content else None
