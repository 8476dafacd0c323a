"""Ledger: a sweep's directory: a run directory and a record for each trial, written as soon as they change.

What is here is all that a sweep needs to go on after its driver has died.

    SWEEP/recipe.yaml           the recipe with its sweep section
    SWEEP/trials/0000/…         the run of trial 0, as that of `manta train`; trial.json is its record
    SWEEP/trials.parquet, .csv  one row a trial
    SWEEP/best.yaml             the best trial's recipe; SWEEP/model/ its best weights
    SWEEP/result.json
"""

import csv
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, NonNegativeInt

from cluster.recipe.loading import dump_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.run_directory import ENVIRONMENT, RECIPE, RESULT, jsonable, read_result, recipe_of
from cluster.tuning.space import columns
from cluster.tuning.target import Target
from nn_models.errors import UserError

RECORD = "trial.json"
LINEAGE = "lineage.json"  # written by the trial, where it is one of a population

# invalid: a sample that the recipe refuses; pruned: stopped by the scheduler
Status = Literal["waiting", "running", "finished", "pruned", "failed", "invalid"]
ENDED = ("finished", "pruned", "failed", "invalid")


@dataclass
class TrialRecord:
    """What is known of one trial."""

    index: int
    overrides: dict[str, Any]  # dotted path -> value
    status: Status = "waiting"
    value: float | None = None  # the sweep's metric, of the best weights so far, which the trial keeps
    epochs: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)  # of these weights
    attempts: int = 0  # how often it was started
    time_s: float = 0.0
    error: str | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)  # pbt: [{epoch, trial, set}], whose values when

    @property
    def name(self) -> str:
        """Its directory's name."""
        return f"{self.index:04d}"


class SweepDirectory:
    """A sweep's files, at a local path or a URI. Only the driver writes the records."""

    def __init__(self, where: str) -> None:
        self.folder = Folder(where)

    def __str__(self) -> str:
        return self.folder.uri

    def exists(self) -> bool:
        """Whether a sweep has begun here."""
        return self.folder.exists(RECIPE)

    def refuse_occupied(self) -> None:
        """Raise UserError where the directory holds something."""
        if self.exists():
            raise UserError(
                str(self), "a sweep or run is here already", "continue a sweep with --resume, or choose another --run"
            )
        if self.folder.names():
            raise UserError(str(self), "not an empty directory", "choose another one with --run")

    def begin(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """Claim an empty directory. Raises UserError where it holds something or cannot be written."""
        self.folder.create()
        self.refuse_occupied()
        self.write_start(recipe, environment)

    def write_start(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """Write what is known before the first trial."""
        self.folder.write_json(ENVIRONMENT, environment)
        self.folder.write_text(RECIPE, dump_recipe(recipe))

    def recipe(self) -> Recipe:
        """The sweep's recipe. Raises UserError where there is none, or it has no sweep section."""
        try:
            text = self.folder.read_text(RECIPE)
        except FileNotFoundError:
            raise UserError(str(self), f"no sweep is here ({RECIPE} is missing)", "give the directory of one") from None
        recipe = recipe_of(text, f"{self}/{RECIPE}")
        if recipe.sweep is None:
            raise UserError(str(self), "a run, not a sweep", "give the directory of `manta sweep`")
        return recipe

    def trial(self, index: int) -> Folder:
        """The run directory of a trial."""
        return self.folder / "trials" / f"{index:04d}"

    def lineage(self, index: int) -> list[dict[str, Any]]:
        """Whose weights and values a trial took over and when, its own beginning first; empty where it takes none."""
        return read_lineage(self.trial(index))

    def write(self, record: TrialRecord) -> None:
        """Write a trial's record."""
        self.trial(record.index).write_json(RECORD, jsonable(asdict(record)))

    def records(self) -> list[TrialRecord]:
        """All trials so far, by index. Raises UserError for a damaged record."""
        found = []
        trials = self.folder / "trials"
        for name in sorted(trials.names()) if self.folder.exists("trials") else []:
            place = trials / name
            if place.exists(RECORD):
                fix = f"delete {place} to run it again"
                record: TrialRecord = place.read_as(RECORD, TrialRecord, fix=fix)
                if record.name != name:
                    raise UserError(f"{place}/{RECORD}", f"damaged (it is that of trial {record.index})", fix)
                found.append(record)
        return found

    def result(self) -> dict[str, Any] | None:
        """result.json; None while the sweep has not ended."""
        return read_result(self.folder)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        self.folder.write_json(RESULT, jsonable(result))

    def write_tables(self, records: Sequence[TrialRecord]) -> None:
        """Write trials.parquet and trials.csv, a row a trial: its sampled values and how it went."""
        rows = [_row(record) for record in records]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
        self.folder.write_text("trials.csv", text.getvalue())
        table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        self.folder.write_bytes("trials.parquet", buffer.getvalue())


def read_lineage(run: Folder) -> list[dict[str, Any]]:
    """Whose weights and values a trial took over and when; empty where it takes none."""
    if not run.exists(LINEAGE):
        return []
    taken: list[TakenOver] = run.read_as(LINEAGE, list[TakenOver], fix=f"delete {run} to run it again")
    return [entry.model_dump() for entry in taken]


class TakenOver(BaseModel):
    """An entry of a lineage: from which epoch on a trial had whose state, with which values."""

    epoch: NonNegativeInt
    trial: NonNegativeInt
    set: dict[str, Any]


def _row(record: TrialRecord) -> dict[str, Any]:
    values = {name: _cell(value) for name, value in columns(record.overrides).items()}
    went = {"trial": record.index, "status": record.status, "value": record.value, "epochs": record.epochs}
    rest = {"attempts": record.attempts, "time_s": record.time_s, "error": record.error or ""}
    return {**went, **values, **record.metrics, **rest}


def _cell(value: Any) -> Any:
    """Lists and sections as JSON text: a table has cells of one type."""
    return value if isinstance(value, (str, int, float, bool)) or value is None else json.dumps(value)


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # of several types, as choices may be
        return pa.array([None if value is None else str(value) for value in values])


@dataclass
class SweepState:
    """A sweep while it runs, for those who watch."""

    target: Target
    num_trials: int
    concurrency: int
    records: list[TrialRecord] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    def best(self) -> TrialRecord | None:
        """The best trial so far: of those that came to their end, where there are any."""
        sign = -1 if self.target.mode == "max" else 1
        for statuses in (("finished",), ("pruned", "running")):
            found = [r for r in self.records if r.status in statuses and r.value is not None]
            if found:
                return min(found, key=lambda record: (sign * (record.value or 0.0), record.index))
        return None

    def count(self, status: Status) -> int:
        """Trials of this status."""
        return sum(record.status == status for record in self.records)


SweepListener = Callable[[SweepState], None]  # called whenever something has changed
