"""Tracking: hands what a run tells on to trackers, each in a thread of its own; none of them can stop or end a run."""

import json
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.errors import Lost
from cluster.recipe.recipe import Recipe
from cluster.runs.tracking.mlflow import MLflow
from cluster.runs.tracking.tensorboard import TensorBoard
from cluster.runs.tracking.tracker import Begun, Ended, Parameter, Status, Tracker
from cluster.runs.tracking.wandb import WandB
from cluster.storage import Folder
from cluster.training.checkpoints import WEIGHTS, one_line
from cluster.training.run_directory import ENVIRONMENT, RECIPE, RESULT, RunDirectory, read_result, scalars_of
from nn_models.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (MLflow, WandB, TensorBoard)}
TRACKING = "tracking.json"  # of a run's directory: what it is called where it is tracked
FILES = ("report.html", RECIPE, ENVIRONMENT, RESULT, f"model/{RECIPE}", f"model/{WEIGHTS}")
PATIENCE_S = 120.0  # that the end of a run waits for its trackers


class Tracking:
    """Called with each line of metrics of a run, as a listener of `train`; the block ends when all is in its directory.

    A tracker takes a run up at its first line, so what never begins is nowhere. One that fails says so once, and is not
    told anything more.
    """

    def __init__(
        self,
        names: Sequence[str],
        recipe: Recipe,
        run: str,
        *,
        name: str | None = None,
        ended: tuple[Status, Mapping[str, float]] | None = None,
    ) -> None:
        """`name` is by default that of its directory; `ended` how it has ended, where no result.json is to say so.

        Raises UserError for a tracker that there is not, or that is not installed.
        """
        refuse_missing(names)
        self._directory, self._name, self._known_end = RunDirectory(run), name, ended
        self._recipe = recipe
        self._names = Names(self._directory.folder)
        self._told = [Told(TRACKERS[name]()) for name in dict.fromkeys(names)]
        self._began = False

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take in one line of metrics; returns at once."""
        if not self._began:
            self._began = True
            last = self._directory.folder.uri.rstrip("/").rpartition("/")[2]
            name = self._name or last or self._recipe.name
            for told in self._told:
                told.begin(name, parameters(self._recipe), self._directory.folder.uri, self._names)
        step, metrics = int(line["step"]), scalars_of(line)
        for told in self._told:
            told.put(lambda tracker: tracker.log(step, metrics))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._began:
            return
        with tempfile.TemporaryDirectory(prefix="manta-") as folder:
            ended = self._ended(Path(folder))
            for told in self._told:
                told.put(lambda tracker: tracker.end(ended))
            for told in self._told:
                told.close()

    @property
    def where(self) -> dict[str, str]:
        """Tracker -> where people find the run, once the block has ended; without those that have failed."""
        return {told.tracker.name: told.tracker.where for told in self._told if self._began and not told.failed}

    def _ended(self, folder: Path) -> Ended:
        """How the run ended, as its directory says, and its files in `folder`."""
        there, files = self._directory.folder, {}
        result: dict[str, Any] = {}
        with suppress(Lost, UserError):  # whoever runs it has said so
            result = read_result(there) or {}
            for name in FILES:
                with suppress(FileNotFoundError):
                    content = there.read_bytes(name)
                    path = folder / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(content)
                    files[name] = path
        if self._known_end is not None:
            return Ended(*self._known_end, files)
        metrics = {name: value for name, value in (result.get("metrics") or {}).items() if value is not None}
        return Ended(result.get("status", "failed"), metrics, files)


def refuse_missing(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that there is not, or that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError("--track", f"{name!r} is no tracker", did_you_mean(name, TRACKERS))
        if missing := [package for package in TRACKERS[name].needs if find_spec(package) is None]:
            fix = f"pip install 'manta-train[{name}]'"
            raise UserError("--track", f"{name} needs {', '.join(missing)}, not installed here", fix)


def tracked_before(run: str) -> tuple[str, ...]:
    """The trackers that know a run which is to go on; without those that are no longer installed."""
    known = Names(Folder(run))
    return tuple(name for name, kind in TRACKERS.items() if known.known(name) and all(map(find_spec, kind.needs)))


class Names:
    """What a run is called by its trackers, in a file of its directory, for when it is continued."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._lock = folder, threading.Lock()

    def known(self, tracker: str) -> str | None:
        """What this tracker calls it."""
        name = self._read().get(tracker)
        return name if isinstance(name, str) else None

    def keep(self, tracker: str, name: str) -> None:
        """Keep what this tracker calls it."""
        with self._lock:
            self._folder.write_json(TRACKING, {**self._read(), tracker: name})

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._folder.read_bytes(TRACKING))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class Told:
    """A tracker and the thread that tells it, one thing after the other."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.failed = tracker, False
        self._jobs: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracking by {tracker.name}", daemon=True)

    def begin(self, name: str, described: Mapping[str, Parameter], where: str, names: Names) -> None:
        """Have the tracker take up a run."""

        def job(tracker: Tracker) -> None:
            names.keep(tracker.name, tracker.begin(Begun(name, described, where, names.known(tracker.name))))

        self._thread.start()
        self.put(job)

    def put(self, job: Callable[[Tracker], None]) -> None:
        """Have the tracker told something more."""
        if not self.failed:
            self._jobs.put(job)

    def close(self) -> None:
        """Wait until it has been told everything, but not for ever."""
        self._jobs.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive() and not self.failed:
            self._give_up(f"it has not answered for {PATIENCE_S:.0f} s")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job(self.tracker)
            except BaseException as error:  # a library of many: some end the process where they are told to
                self._give_up(f"{type(error).__name__}: {one_line(error)}")
                return

    def _give_up(self, why: str) -> None:
        self.failed = True
        logger.warning("the run is no longer tracked by %s (%s); it goes on", self.tracker.name, why)


def parameters(recipe: Recipe) -> dict[str, Parameter]:
    """The recipe's values by dotted path, lists and what is empty as text."""
    found: dict[str, Parameter] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                add(f"{path}.{name}" if path else str(name), inner)
        else:
            found[path] = value if isinstance(value, Parameter) else json.dumps(value)

    add("", recipe.model_dump(mode="json", exclude={"sweep"}))
    return found
