"""RunDirectory: what a run leaves behind: recipe, environment, metrics, events, checkpoints, model, result."""

import errno
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, NonNegativeInt

from cluster.recipe.loading import ENVIRONMENT, RECIPE, dump_recipe, lifted, parse_yaml
from cluster.recipe.recipe import Recipe
from cluster.runtime.existing import STORAGE
from cluster.storage import Folder, failure
from cluster.training.events import Events
from nn_models.errors import UserError
from nn_models.spec import validate

METRICS = "metrics.jsonl"
RESULT = "result.json"
EVALUATION = "evaluation.safetensors"
NO_METRICS = ("step", "epoch", "split", "time_s", "rows_per_s", "learning_rate", "grad_norm")  # in a line of metrics


class RunDirectory:
    """A run's files, at a local path or a URI. Only rank 0 and the driver write."""

    def __init__(self, where: str | Folder) -> None:
        self.folder = where if isinstance(where, Folder) else Folder(where)

    def __str__(self) -> str:
        return self.folder.uri

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self.folder.exists(RECIPE)

    def begin(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """Claim an empty directory. Raises UserError where it holds something or cannot be written."""
        self.folder.create()
        self.refuse_occupied()
        self.write_start(recipe, environment)

    def refuse_occupied(self) -> None:
        """Raise UserError where the directory holds something."""
        if self.exists():
            raise UserError(
                str(self), "a run is here already", "continue it with --resume, or choose another directory with --run"
            )
        if self.folder.names():
            raise UserError(str(self), "not an empty directory", "choose another one with --run")

    def write_start(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """Write what is known before training."""
        text = dump_recipe(recipe)
        self.folder.write_json(ENVIRONMENT, environment)
        self.folder.write_text(f"model/{RECIPE}", text)
        self.folder.write_text(RECIPE, text)
        self.folder = self.folder.anchored()

    def recipe(self, name: str = RECIPE) -> Recipe:
        """The run's resolved recipe, or the one beside its model. Raises UserError where there is none."""
        try:
            text = self.folder.read_text(name)
        except FileNotFoundError:
            raise UserError(
                str(self), f"not a run's directory ({name} is missing)", "give the one of `manta train`"
            ) from None
        return recipe_of(text, f"{self}/{name}")

    def result(self) -> dict[str, Any] | None:
        """result.json; None while the run has not ended."""
        return read_result(self.folder)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        self.folder.write_json(RESULT, jsonable(result))


def recipe_of(text: str, path: str) -> Recipe:
    """The recipe that a run or sweep has written into this file. Raises UserError where it is damaged."""
    content = lifted(parse_yaml(text, name=path))
    try:
        return validate(Recipe, content)
    except UserError as error:
        problem = error.problems[0]
        raise UserError(
            path,
            f"no recipe that this version of manta can read ({problem.path}: {problem.message})",
            "restore it, or use the version that has written it",
        ) from None


class _Rollback(BaseModel):
    """What others read of one."""

    step: int


class _Result(BaseModel):
    """What others read of result.json, of a run or a sweep; whatever else is in it stays as it is."""

    status: Literal["finished", "failed", "stopped"]
    metrics: dict[str, float | None]
    epochs: NonNegativeInt | None = None
    steps: NonNegativeInt | None = None
    error: str | None = None
    ended: str | None = None
    best: dict[str, Any] | None = None
    rollbacks: list[_Rollback] | None = None
    metric: str | None = None
    trials: dict[str, int] | None = None
    trials_per_hour: float | None = None


class _Environment(BaseModel):
    """What others read of environment.json."""

    data: dict[str, str] | None = None


def read_result(folder: Folder) -> dict[str, Any] | None:
    """What result.json says; None where there is none. Raises UserError for a damaged one."""
    if not folder.exists(RESULT):
        return None
    folder.read_as(RESULT, _Result)
    result: dict[str, Any] = folder.read_json(RESULT)
    return result


def read_environment(folder: Folder) -> dict[str, Any]:
    """What environment.json says; nothing where there is none. Raises UserError for a damaged one."""
    if not folder.exists(ENVIRONMENT):
        return {}
    folder.read_as(ENVIRONMENT, _Environment)
    found: dict[str, Any] = folder.read_json(ENVIRONMENT)
    return found


class Recorder:
    """Appends to metrics.jsonl and to TensorBoard's event file; rank 0 has it.

    Object stores cannot append, so there both are kept in a temporary directory and uploaded by `flush`.
    """

    def __init__(self, run: RunDirectory, *, keep_to_step: int) -> None:
        """Lines of steps past `keep_to_step` come from before a restart and are dropped."""
        self._run, self._begun = run, run.exists()
        self._remote = run.folder.local is None
        self._local = Path(tempfile.mkdtemp(prefix="manta-")) if self._remote else Path(run.folder.path)
        lines = (json.dumps(entry) + "\n" for entry in _kept(run, keep_to_step))
        (Folder(self._local) if self._remote else run.folder).write_text(METRICS, "".join(lines))
        with self._writing():
            self._file = (self._local / METRICS).open("a", buffering=1)
            self._events = Events(self._local / "events", purge_step=keep_to_step + 1)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line of metrics. Raises StorageFailed where that cannot be done."""
        with self._writing():
            self._file.write(json.dumps(jsonable(entry)) + "\n")
            self._events.add(entry["step"], scalars_of(entry))

    def flush(self) -> None:
        """Make what was appended visible in the run's directory. Raises StorageFailed where that has been deleted."""
        with self._writing():
            self._file.flush()
            self._events.flush()
        if self._remote:
            self._run.folder.write_bytes(METRICS, (self._local / METRICS).read_bytes())
            for path in (self._local / "events").iterdir():
                self._run.folder.write_bytes(f"events/{path.name}", path.read_bytes())
        if self._begun and not self._run.exists():  # files that are open can be written on, and nobody would see it
            raise failure(f"{self._run}/{RECIPE}", "found", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))

    def close(self) -> None:
        """Write out everything and close the files."""
        try:
            self.flush()
        finally:
            with suppress(OSError):  # told already: closing tries once more to write what could not be written
                self._events.close()
            with suppress(OSError):
                self._file.close()
            if self._remote:
                shutil.rmtree(self._local, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise failure(f"{self._local}/{METRICS}", "written", error) from None


def scalars_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of metrics by their tags in TensorBoard and in other trackers: `validation/loss`."""
    # an epoch's and an interval's figures may come at the same step: each has a tag of its own
    of = "train_interval" if entry["split"] == "train" and not entry.get("end_of_epoch") else entry["split"]
    return {
        f"{of}/{name}": value
        for name, value in entry.items()
        if isinstance(value, float) and math.isfinite(value) and name != "time_s"
    }


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a kill cut short is left out."""
    if not run.folder.exists(METRICS):
        return []
    entries = map(_entry, run.folder.read_text(METRICS).splitlines())
    return [entry for entry in entries if entry is not None]


def _entry(line: str) -> dict[str, Any] | None:
    """A line's content; None where it is no line of metrics."""
    try:
        entry = json.loads(line)
        _Line.model_validate(entry)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], entry)


class _Line(BaseModel):
    """What every line of metrics has."""

    step: NonNegativeInt
    epoch: NonNegativeInt
    split: str
    time_s: float


def _kept(run: RunDirectory, last_step: int) -> list[dict[str, Any]]:
    """The lines up to a step; the test, which ends a run, is done anew."""
    return [entry for entry in read_metrics(run) if entry["step"] <= last_step and entry["split"] != "test"]


def environment(
    *, seed: int, num_workers: Any, use_gpu: bool, device: str, data: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Versions, hardware, world size and seed; of the data what `data_facts` says."""
    names = ("manta-train", "torch", "torchvision", "ray", "numpy", "pyarrow", "pydantic")
    return {
        "command": " ".join(sys.argv[:1] and [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": device,
        "use_gpu": use_gpu,
        "num_workers": num_workers,
        "seed": seed,
        **({"data": dict(data)} if data else {}),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def jsonable(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(inner) for inner in value]
    return value


def result_of(status: dict[str, Any], directory: RunDirectory, began: float) -> dict[str, Any]:
    """What result.json says of a run; of one that did not finish, what its files tell: `metrics` of the weights kept.

    These may be known already. `last` has the last metrics that were written, of an unfinished epoch too.
    """
    first = status.pop("first_step_at", None)
    if status["status"] != "finished" and "last" not in status:
        from cluster.training.checkpoints import read_best

        lines = read_metrics(directory)
        by_split = {line["split"]: line for line in lines if line["split"] != "test"}
        best = read_best(directory.folder)
        status["best"] = best or {}
        status.setdefault("metrics", best["metrics"] if best else {})
        status["last"] = {
            "epoch": lines[-1]["epoch"] + 1 if lines else 0,
            "step": lines[-1]["step"] if lines else 0,
            "metrics": {
                f"{split}/{name}": value
                for split, line in by_split.items()
                for name, value in line.items()
                if name not in NO_METRICS and isinstance(value, float)
            },
        }
        status["steps"] = status["last"]["step"]
    now = time.time()
    status["metrics"] = jsonable(status["metrics"])
    times = {"wall_s": round(now - began, 3), "time_to_first_step_s": round(first - began, 3) if first else None}
    return {**status, **times}


@contextmanager
def new_place(parent: str, recipe: Recipe) -> Iterator[str]:
    """A new directory PARENT/NAME-DATE-TIME for a run or a sweep, with a number behind it where that is taken.

    PARENT is in the folder or at the URI that $MANTA_STORAGE names, else in the current directory. A local one is made
    at once, so no two processes get the same one. Where the block leaves it empty it is removed again. Raises UserError
    where it cannot be made.
    """
    storage = os.environ.get(STORAGE, "")
    name = f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    names = (name if number == 0 else f"{name}-{number}" for number in count())
    if "://" in storage:
        places = Folder(storage) / parent
        yield next((places / name).uri for name in names if not places.exists(name))
        return
    place = _made(Path(storage, parent, name) for name in names)
    try:
        yield str(place)
    finally:
        for folder in (place, place.parent):
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _made(names: Iterator[Path]) -> Path:
    """The first of these directories that was not there, and now is."""
    for name in names:
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
            name.mkdir()
        except FileExistsError:
            if name.parent.is_dir():
                continue
            raise UserError(str(name.parent), "not a directory", "choose another one with --run") from None
        except FileNotFoundError:  # another process, which needed the parent no more, has just removed it
            continue
        except OSError as error:
            raise UserError(
                str(name), f"cannot be made ({error.strerror})", "choose another directory with --run"
            ) from None
        return name
    raise AssertionError("names do not end")
