"""A sweep's charts as inline SVG: the curves of all trials, parallel coordinates, bars of importance."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jobs.report.charts import Axis, figure
from jobs.report.files import AbsentError
from jobs.report.importance import Importance
from jobs.report.trials import Column, Trial, ranked, shown

WIDTH, HEIGHT = 800, 300
LEFT, RIGHT, TOP, BOTTOM = 52.0, 790.0, 10.0, 262.0
MAX_LINES = 300
MAX_POINTS = 80  # of a curve
MARGIN = 0.9
MAX_LABEL = 18
AXIS_WIDTH = 118  # of parallel coordinates, at least
MAX_TICKS = 14


class Line(NamedTuple):
    """One trial's line."""

    path: str
    kind: str  # best | finished | pruned | failed | running
    strength: str  # 0 to 1: how good it is among the others
    tooltip: str


class Curves(NamedTuple):
    """The metric over epochs."""

    alt: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    rungs: list[tuple[float, str]]
    remark: str


class Upright(NamedTuple):
    """One axis of parallel coordinates."""

    x: float
    label: str
    title: str
    ticks: list[tuple[float, str]]
    remark: str


class Parallel(NamedTuple):
    """Each trial a line from value to value, to its metric at the right."""

    alt: str
    width: int
    axes: list[Upright]
    lines: list[Line]
    absent: bool  # whether some values are not there in some trials


class Bar(NamedTuple):
    """The importance of one path."""

    path: str
    width: float
    low: float
    high: float
    text: str
    y: int


class Bars(NamedTuple):
    """All of them, and the line of what random numbers get."""

    bars: list[Bar]
    noise: float
    height: int


def curves(trials: Sequence[Trial], best: Trial | None, metric: str, mode: str, rungs: Sequence[int]) -> Curves:
    """The curves of all trials that have one, the best on top."""
    drawn = [trial for trial in _order(trials, best, mode) if trial.curve]
    if not drawn:
        raise AbsentError(f"no trial has reported {metric} yet")
    everything = np.array([point for trial in drawn for point in trial.curve])
    log = is_logarithmic(metric, everything[:, 1])
    x_axis = Axis(np.append(everything[:, 0], 0), (LEFT, RIGHT), whole=True)
    margin = everything[:, 1].min() * MARGIN if log else everything[0, 1]  # the best line lies not on the frame
    y_axis = Axis(np.append(everything[:, 1], margin), (BOTTOM, TOP), log=log)
    strengths = _strengths(drawn, mode)
    lines = [
        Line(
            _path([(float(x_axis.place(x)), float(y_axis.place(y))) for x, y in _thinned(trial.curve)]),
            _kind(trial, best),
            strengths[trial.index],
            tooltip(trial, metric),
        )
        for trial in drawn
    ]
    ends = [trial.curve[-1][1] for trial in drawn]
    return Curves(
        alt=f"{metric} by epoch of {len(drawn)} trials, which ended between {figure(metric, min(ends))} and "
        f"{figure(metric, max(ends))}",
        lines=lines,
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        rungs=[(float(x_axis.place(rung)), f"rung at epoch {rung}") for rung in rungs if x_axis.holds(rung)],
        remark="logarithmic" if log else "",
    )


def parallel(
    trials: Sequence[Trial], best: Trial | None, columns: Sequence[Column], metric: str, mode: str
) -> Parallel:
    """Parallel coordinates of all trials with a value."""
    drawn = [trial for trial in _order(trials, best, mode) if trial.value is not None]
    columns = [column for column in columns if any(column.path in trial.values for trial in drawn)]
    if not drawn or not columns:
        raise AbsentError("no trial has a value yet")
    width = max(WIDTH, 140 + AXIS_WIDTH * len(columns))
    places = np.linspace(62, width - 62, len(columns) + 1).round(1).tolist()
    top, bottom, below = 34.0, 236.0, 262.0
    uprights, along = [], []
    for x, column in zip(places, columns, strict=False):
        values = [trial.values[column.path] for trial in drawn if column.path in trial.values]
        given = np.array([column.place(value) for value in values])
        if column.categories is None:
            axis = Axis(np.append(given, column.bounds), (bottom, top), log=column.log)
            ticks, remark = axis.ticks, "logarithmic" if column.log else ""
        else:
            axis = Axis(np.array([0.0, max(1, len(column.categories) - 1)]), (bottom - 8, top + 8))
            axis.low, axis.high = 0.0, float(max(1, len(column.categories) - 1))
            stride = math.ceil(len(column.categories) / MAX_TICKS)
            listed = list(enumerate(column.categories))[::stride]
            ticks, remark = [(float(axis.place(place)), _short(shown(value))) for place, value in listed], ""
        along.append(
            [
                (x, float(axis.place(column.place(t.values[column.path]))) if column.path in t.values else below)
                for t in drawn
            ]
        )
        if len(values) < len(drawn):
            ticks = [*ticks, (below, "none")]
        uprights.append(Upright(x, _label(column.path), column.path, ticks, remark))
    results = np.array([trial.value for trial in drawn])
    log = is_logarithmic(metric, results)
    axis = Axis(results, (bottom, top), log=log)
    uprights.append(Upright(places[-1], _label(metric), metric, axis.ticks, "logarithmic" if log else ""))
    along.append([(places[-1], float(axis.place(trial.value))) for trial in drawn])
    strengths = _strengths(drawn, mode)
    lines = [
        Line(_path(list(points)), _kind(trial, best), strengths[trial.index], tooltip(trial, metric))
        for trial, points in zip(drawn, zip(*along, strict=True), strict=True)
    ]
    return Parallel(
        alt=f"Parallel coordinates of {len(drawn)} trials: {', '.join(c.path for c in columns)}, against {metric}",
        width=width,
        axes=uprights,
        lines=lines,
        absent=any(point[1] == below for points in along for point in points),
    )


def bars(found: Importance) -> Bars:
    """Importance as bars, in pixels of a chart 420 wide."""
    most = max([mean + deviation for _, mean, deviation in found.rows] + [found.noise, 1e-9])

    def pixels(value: float) -> float:
        return round(420 * max(0.0, value) / most, 1)

    rows = [
        Bar(path, pixels(mean), pixels(mean - deviation), pixels(mean + deviation), f"{mean:.2f}", 26 * place)
        for place, (path, mean, deviation) in enumerate(found.rows)
    ]
    return Bars(rows, pixels(found.noise), 26 * len(rows))


def is_logarithmic(metric: str, values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> bool:
    """Whether the good trials of a sweep would lie on top of each other on a linear axis."""
    low, high = values.min(), values.max()
    return bool(re.search("loss|mse|mae|distance|l1|perplexity", metric) and low > 0 and high / low >= 8)


def tooltip(trial: Trial, metric: str) -> str:
    """What is told of a trial where one points at it."""
    value = f", {metric} {figure(metric, trial.value)}" if trial.value is not None else ""
    given = "".join(f"\n{path}: {shown(value)}" for path, value in trial.values.items())
    return f"trial {trial.index}: {trial.status} after {trial.epochs} epochs{value}{given}"


def _order(trials: Sequence[Trial], best: Trial | None, mode: str) -> list[Trial]:
    """The best trials, MAX_LINES at most; what is drawn last lies on top."""
    valued = ranked(trials, mode)
    others = [trial for trial in [*valued, *(t for t in trials if t.value is None)] if trial is not best]
    return [*reversed(others[: MAX_LINES - 1]), *([best] if best else [])]


def _strengths(drawn: Sequence[Trial], mode: str) -> dict[int, str]:
    places = {trial.index: place for place, trial in enumerate(ranked(drawn, mode))}
    most = max(1, len(places) - 1)
    return {trial.index: f"{(1 - places.get(trial.index, most) / most) ** 1.5:.2f}" for trial in drawn}


def _kind(trial: Trial, best: Trial | None) -> str:
    if trial is best:
        return "best"
    return trial.status if trial.status in ("finished", "pruned", "failed", "running") else "other"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).astype(int))
    return [points[place] for place in chosen]


def _path(points: Sequence[tuple[float, float]]) -> str:
    (x, y), *rest = points
    # h0: a single point shows as a round cap
    return f"M{x:g} {y:g}" + ("".join(f"L{x:g} {y:g}" for x, y in rest) or "h0")


def _label(path: str) -> str:
    """As much of a path as stands above an axis: its end says most."""
    last = path.rpartition(".")[2]
    return next((text for text in (path, last) if len(text) <= MAX_LABEL), f"…{path[-MAX_LABEL + 1 :]}")


def _short(text: str) -> str:
    return text if len(text) <= 14 else f"{text[:13]}…"
