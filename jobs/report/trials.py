"""A sweep's trials as its report reads them: records, curves, and from what each value was drawn."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.recipe.distributions import Choice, Distribution, Uniform, text
from cluster.storage import Folder
from cluster.tuning.space import columns
from jobs.report.files import is_number, left_out, mapping, read_records

RECORD = "trial.json"
READERS = 8  # at once: a bucket answers each question in tens of milliseconds


@dataclass
class Trial:
    """One trial."""

    index: int
    status: str
    value: float | None  # the best of the metric
    epochs: int
    values: dict[str, Any]  # by dotted path, flat
    metrics: dict[str, float]
    error: str | None
    attempts: int
    time_s: float | None
    lineage: list[tuple[int, int, dict[str, Any]]]  # (epochs done, trial, values) where another's state was taken over
    curve: list[tuple[float, float]] = field(default_factory=list)  # (epochs done, metric)


def read_trials(folder: Folder, metric: str | None, notes: list[str]) -> list[Trial]:
    """All trials that can be read, by index."""
    trials = folder / "trials"
    names: list[str] = []
    with left_out(notes, "The trials", file="trials"):
        names = [name for name in trials.names() if re.fullmatch(r"\d{1,9}", name)]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda name: _read(trials / name, int(name), metric), names))
    without: list[int] = []
    lost = 0
    for trial, num_unreadable, trial_notes in found:
        notes += trial_notes
        lost += num_unreadable
        if trial and not trial.curve and trial.status in ("finished", "pruned", "running"):
            without.append(trial.index)
    if without and metric:
        more = ", …" if len(without) > 10 else ""
        notes.append(f"Curves of trials {', '.join(map(str, without[:10]))}{more}: no {metric} in their metrics.jsonl.")
    if lost:
        notes.append(f"Lines of the trials' metrics.jsonl that cannot be read: {lost}.")
    return [trial for trial, _, _ in found if trial]


def _read(folder: Folder, index: int, metric: str | None) -> tuple[Trial | None, int, list[str]]:
    notes: list[str] = []
    trial = None
    with left_out(notes, f"Trial {index}", file=RECORD):
        entry = json.loads(folder.read_bytes(RECORD))
        if not isinstance(entry, dict):
            raise ValueError("it holds no record")
        trial = _trial(index, entry)
    if trial is None:
        return None, 0, notes
    lost = 0
    if metric and folder.exists("metrics.jsonl"):
        with left_out(notes, f"The curve of trial {index}", file="metrics.jsonl"):
            records, lost = read_records(folder.read_bytes("metrics.jsonl"))
            trial.curve = _curve(records, metric)
    return trial, lost, notes


def _trial(index: int, entry: Mapping[str, Any]) -> Trial:
    error, lineage = entry.get("error"), entry.get("lineage")
    taken = [mapping(one) for one in lineage] if isinstance(lineage, list) else []
    return Trial(
        index=index,
        status=str(entry.get("status", "unknown")),
        value=_number(entry.get("value")),
        epochs=int(_number(entry.get("epochs")) or 0),
        values=columns(mapping(entry.get("overrides"))),
        metrics={str(name): float(v) for name, v in mapping(entry.get("metrics")).items() if is_number(v)},
        error=str(error) if error else None,
        attempts=int(_number(entry.get("attempts")) or 0),
        time_s=_number(entry.get("time_s")),
        lineage=[
            (int(one["epoch"]), int(one["trial"]), columns(mapping(one.get("set"))))
            for one in taken
            if is_number(one.get("epoch")) and is_number(one.get("trial"))
        ],
    )


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _curve(records: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    split, _, name = metric.partition("/")
    ended = (
        record
        for record in records
        if str(record.get("split", "train")) == split and (split != "train" or record.get("end_of_epoch"))
    )
    return [
        (float(record["epoch"] + 1) if record["step"] else 0.0, float(record[name]))
        for record in ended
        if is_number(record.get(name)) and is_number(record.get("epoch"))
    ]


def best_of(trials: Iterable[Trial], mode: str) -> Trial | None:
    """As the sweep chooses it: of those that came to their end, where there are any."""
    valued = ranked(trials, mode)
    for statuses in (("finished",), ("pruned", "running")):
        found = [trial for trial in valued if trial.status in statuses]
        if found:
            return found[0]
    return None


def ranked(trials: Iterable[Trial], mode: str) -> list[Trial]:
    """Those with a value, the best first."""
    sign = -1 if mode == "max" else 1
    valued = [trial for trial in trials if trial.value is not None]
    return sorted(valued, key=lambda trial: (sign * (trial.value or 0.0), trial.index))


@dataclass
class Column:
    """One sampled path. Its values are numbers, or of a few categories."""

    path: str
    log: bool
    categories: list[Any] | None  # in order; None for numbers
    bounds: tuple[float, ...] = ()  # of numbers: between which they were drawn, where that is known

    def place(self, value: Any) -> float:
        """A value as a number: itself, or its category's place."""
        return float(value) if self.categories is None else float(self.categories.index(value))


def columns_of(trials: Sequence[Trial], drawn_from: Iterable[tuple[str, Distribution]]) -> list[Column]:
    """A column for each path that some trial has a value of. `drawn_from` are the space's names and distributions."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.values))
    sources: dict[str, list[Distribution]] = {}
    for name, distribution in drawn_from:
        sources.setdefault(re.sub(r"\.(choice|grid)\.\d+(?=\.|$)", "", name), []).append(distribution)
    return [
        _column(path, [t.values[path] for t in trials if path in t.values], sources.get(path, [])) for path in paths
    ]


def _column(path: str, values: Sequence[Any], sources: Sequence[Distribution]) -> Column:
    numbers = all(is_number(value) for value in values)
    chosen = [source for source in sources if isinstance(source, Choice)]
    if numbers and not chosen:
        log = any(isinstance(source, Uniform) and source.log for source in sources) and min(values) > 0
        ranges = [source for source in sources if isinstance(source, Uniform)]
        return Column(path, log, None, tuple(bound for one in ranges for bound in (one.low, one.high)))
    listed = [text(option) for choice in chosen for option in choice.options]
    different = list({(str(type(value)), value): value for value in values}.values())

    def order(value: Any) -> tuple[int, float, str]:
        told = value if isinstance(value, str) else text(value)
        place = listed.index(told) if told in listed else len(listed)
        return (0, float(value), "") if numbers else (place, 0.0, str(value))

    return Column(path, False, sorted(different, key=order))


def shown(value: Any) -> str:
    """A sampled value as people read it."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else text(value)
