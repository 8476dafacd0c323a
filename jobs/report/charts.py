"""Charts: curves and scatter plots as paths of inline SVG; importing matplotlib would take longer than all of it."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.report.files import AbsentError, is_number
from nn_models.metrics import Metric
from nn_models.zoo import METRICS

Array = NDArray[Any]

MAX_CHARTS = 24
MAX_CURVE_POINTS = 400  # longer curves are averaged in pieces: the page stays small and the line readable
MAX_DOTS = 60  # points with a tooltip of their own
MAX_SCATTER_POINTS = 800  # with a tooltip each; of more rows every one is drawn, those at one place once
SPLITS = ("train", "validation", "test")
SHOWN_LAST = ("learning_rate", "grad_norm", "rows_per_s")
NOT_METRICS = ("step", "epoch", "time_s")

COLOURS = ("first", "second")  # of metrics that share a chart
TOGETHER = [metric for metric in METRICS.values() if metric.together]
# Levels to reach in the chart of another metric: what perfect rows would have.
FLOORS = {metric.name: metric.floor_of for metric in METRICS.values() if metric.floor_of}


def number(value: Any) -> str | None:
    """As people read it; None for what is no number."""
    if not is_number(value):
        return None
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}".replace(",", "\u202f")  # narrow no-break space
    return re.sub(r"e([+-])0*", lambda match: f"e{match[1].strip('+')}", f"{value:.4g}")


def words(name: str) -> str:
    """A metric's name in words, with its split where it has one: `test/accuracy`."""
    split, _, bare = name.rpartition("/")
    told = re.sub("per s$", "per second", _metric(bare).in_words)
    return f"{split.replace('/', ' ')} {told}" if split else told


def figure(name: str, value: float) -> str:
    """A metric's value: shares in per cent."""
    is_share = _metric(name.rpartition("/")[2]).is_share and 0 <= value <= 1
    return f"{100 * value:.2f}\u202f%" if is_share else str(number(value))


def _metric(name: str) -> Metric:
    """As it is declared; of what nobody declares nothing but the name is known."""
    return METRICS.get(name) or Metric(name)


class Curve(NamedTuple):
    """One line of a chart, in its coordinates: of a split, or of one of several metrics."""

    label: str
    colour: str  # the split's name, or one of COLOURS
    path: str
    faint: str  # the intervals inside the epochs
    dots: list[tuple[float, float, str]]  # x, y, tooltip
    last: str


class Chart(NamedTuple):
    """What the template needs to draw one chart as SVG."""

    title: str
    alt: str
    curves: list[Curve]
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    guide: str  # path: where the best checkpoint is; in a scatter chart the diagonal
    remark: str
    levels: Sequence[tuple[str, str, str]] = ()  # path, label, value of lines across: what can be reached
    marks: Sequence[tuple[str, str]] = ()  # path, tooltip of lines down: the rollbacks
    y_label: str = ""  # of a scatter chart


WIDTH, HEIGHT = 400, 230
X_PIXELS, Y_PIXELS = (50.0, 390.0), (196.0, 10.0)


class Axis:
    """Maps values to pixels, with ticks at round values."""

    def __init__(self, values: Array, pixels: tuple[float, float], *, log: bool = False, whole: bool = False) -> None:
        low, high = float(values.min()), float(values.max())
        if log:
            low, high = math.log10(low), math.log10(high)
        if whole and 0 < low <= high / 10:
            low = 0.0
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            margin = 0.5 if whole or log else abs(low) / 10 or 1.0
            low, high = low - margin, high + margin
        self.log = log
        if log:
            num_decades = high - low
            factors = (1, 2, 5) if num_decades < 3 else (1,)
            stride = max(1, math.ceil(num_decades / 7))
            ticks = [factor * 10.0**decade for decade in range(math.floor(low), math.ceil(high) + 1, stride)
                     for factor in factors]  # fmt: skip
        else:
            rough = (high - low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
            step = max(step, 1.0) if whole else step
            if not whole:  # end at ticks
                low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
            ticks = [count * step for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        self.low, self.high, self.pixels = low, high, pixels
        self.ticks = [(float(self.place(tick)), _tick_label(tick)) for tick in ticks if self.holds(tick)]

    def holds(self, value: float) -> bool:
        """Whether a value lies on the axis."""
        value = math.log10(value) if self.log else value
        return self.low <= value + 1e-9 * abs(value) and value - 1e-9 * abs(value) <= self.high

    def place(self, values: Any) -> Any:
        """Pixels of a value or an array; NaN stays NaN."""
        values = np.log10(values) if self.log else values
        start, end = self.pixels
        return np.round(start + (values - self.low) / (self.high - self.low) * (end - start), 1)


def _tick_label(value: float) -> str:
    size = abs(value)
    if size and not 1e-3 <= size < 1e9:
        return str(number(float(f"{value:.3g}"))) if size < 1 else f"{value:.3g}".replace("e+", "e")
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if unit == 'M' else 1e3):.6g}{unit}"
    return f"{value + 0.0:.9g}"


class Mark(NamedTuple):
    """A step to point out in all charts."""

    step: float
    tooltip: str


class _Series(NamedTuple):
    """What one curve is drawn from."""

    label: str
    colour: str
    metric: str
    points: list[tuple[float, float, bool]]  # x, value, whether it is an epoch's average; in order of x


class _Across(NamedTuple):
    """The horizontal axis that all charts of a run share."""

    label: str
    scale: float  # steps of one unit
    best: float | None
    marks: Sequence[Mark]


def metric_charts(records: Sequence[Mapping[str, Any]], best_step: Any, marks: Sequence[Mark] = ()) -> list[Chart]:
    """One chart for each metric, against epochs where the lines tell how long an epoch is, else against steps."""
    length = steps_per_epoch(records)
    across = _Across("epoch" if length else "step", length or 1, best_step if is_number(best_step) else None, marks)
    course = [record for record in records if record.get("split") != "test"]  # one point is no curve, but a figure
    names = {name for record in course or records for name, value in record.items() if is_number(value)} - set(
        NOT_METRICS
    )
    floors = {name: metric for name, metric in FLOORS.items() if {name, metric} <= names}
    together: dict[str, dict[str, str]] = {}
    for metric in TOGETHER:
        if metric.name in names:
            together.setdefault(metric.together, {})[metric.name] = metric.label
    together = {title: labels for title, labels in together.items() if len(labels) > 1}
    alone = names - set(floors) - {name for labels in together.values() for name in labels}
    charts = [
        _metric_chart(
            title,
            [
                series._replace(label=label, colour=colour)
                for (name, label), colour in zip(labels.items(), cycle(COLOURS), strict=False)
                for series in _series(name, records, across.scale)
            ],
            across,
        )
        for title, labels in together.items()
    ]
    last = {name: place for place, name in enumerate(SHOWN_LAST)}
    first = {"loss": -3, **dict.fromkeys(floors.values(), -2)}
    for name in sorted(alone, key=lambda name: (last.get(name, first.get(name, -1)), name)):
        levels = [level for floor, metric in floors.items() if metric == name for level in _levels(floor, records)]
        charts.append(_metric_chart(words(name), _series(name, records, across.scale), across, levels))
    return charts


def steps_per_epoch(records: Sequence[Mapping[str, Any]]) -> float:
    """0 where the lines do not tell."""
    ends = [record for record in records if record.get("end_of_epoch") and is_number(record.get("epoch"))]
    length = ends[-1]["step"] / (ends[-1]["epoch"] + 1) if ends else 0
    return length if length > 0 else 0


def _series(name: str, records: Sequence[Mapping[str, Any]], scale: float) -> list[_Series]:
    """A metric's values on each split."""
    points: dict[str, list[tuple[float, float, bool]]] = {}
    for record in records:
        if name in record:
            value = float(record[name]) if is_number(record[name]) else math.nan
            split = str(record.get("split", "train"))
            points.setdefault(split, []).append((record["step"] / scale, value, bool(record.get("end_of_epoch"))))
    splits = sorted(points, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS))
    return [_Series(split, split, name, points[split]) for split in splits]


def _levels(name: str, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(label, value) of a floor on each split that has curves of its own; it is the same at each look."""
    last = {str(record.get("split", "train")): record[name] for record in records if is_number(record.get(name))}
    return [(f"floor, {split}", float(value)) for split, value in last.items()]


def _metric_chart(
    title: str, series: Sequence[_Series], across: _Across, levels: Sequence[tuple[str, float]] = ()
) -> Chart:
    everything = np.array([point for one in series for point in one.points], dtype=float)
    finite = everything[np.isfinite(everything[:, 1])]
    on_page = np.concatenate([finite[:, 1], [value for _, value in levels]])
    log = spans_decades(series[0].metric, on_page)
    x_axis, y_axis = Axis(everything[:, 0], X_PIXELS, whole=True), Axis(on_page, Y_PIXELS, log=log)
    curves = []
    told = []
    for label, colour, name, points in series:
        line = list(points)
        averages = [point for point in line if point[2]]
        intervals = [point for point in line if not point[2]]
        faint: list[tuple[float, float, bool]] = []
        if intervals and name != "learning_rate":  # a learning rate is no average of anything
            line, faint = (averages, intervals) if len(averages) > 1 else (intervals, [])
        known = [value for _, value, _ in line if math.isfinite(value)]
        if not known:
            continue
        x, y = thinned(line)
        dots = [
            (
                float(x_axis.place(at)),
                float(y_axis.place(value)),
                f"{label}, {across.label} {at:.4g}: {figure(name, value)}",
            )
            for at, value in zip(x, y, strict=True)
            if math.isfinite(value) and len(x) <= MAX_DOTS
        ]
        faint_path = path_of(x_axis, y_axis, *thinned(faint)) if faint else ""
        curves.append(Curve(label, colour, path_of(x_axis, y_axis, x, y), faint_path, dots, figure(name, known[-1])))
        first, last = figure(name, known[0]), figure(name, known[-1])
        told.append(f"{label} {last}" if len(known) == 1 else f"{label} from {first} to {last}")
    num_lost = len(everything) - len(finite)
    remarks = ["logarithmic"] * log + [f"{num_lost} not finite"] * bool(num_lost)
    told += [f"{label} {number(value)}" for label, value in levels]
    return Chart(
        title=title,
        alt=f"{title} by {across.label}: {'; '.join(told)}",
        curves=curves,
        x_label=across.label,
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        guide="" if across.best is None else _upright(x_axis, across.best / across.scale),
        remark=", ".join(remarks),
        levels=[
            (f"M{X_PIXELS[0]} {y_axis.place(value)}H{X_PIXELS[1]}", label, str(number(value)))
            for label, value in levels
        ],
        marks=[(path, mark.tooltip) for mark in across.marks if (path := _upright(x_axis, mark.step / across.scale))],
    )


def spans_decades(name: str, values: Array) -> bool:
    """Whether only a logarithmic axis shows all of the values."""
    low, high = values.min(), values.max()
    enough = 10 if name in FLOORS.values() else 100  # a bad start would hide how near the floor the end is
    return bool(re.search("loss|grad_norm|perplexity|frechet", name) and low > 0 and high / low >= enough)


def _upright(x_axis: Axis, x: float) -> str:
    """Path of a line down the chart; none where it would lie outside."""
    return f"M{x_axis.place(x)} {Y_PIXELS[0]}V{Y_PIXELS[1]}" if x_axis.holds(x) else ""


def thinned(points: Sequence[tuple[float, float, bool]]) -> tuple[Array, Array]:
    """x and y of points, of a long curve averaged in pieces."""
    x, y, _ = np.array(points, dtype=float).T
    if len(x) <= MAX_CURVE_POINTS:
        return x, y
    pieces = np.linspace(0, len(x), MAX_CURVE_POINTS, endpoint=False).astype(int)
    sizes = np.diff(pieces, append=len(x))
    return np.add.reduceat(x, pieces) / sizes, np.add.reduceat(y, pieces) / sizes  # a NaN keeps its piece out


def path_of(x_axis: Axis, y_axis: Axis, x: Array, y: Array) -> str:
    """An SVG path through points, with gaps where a value is not finite."""
    parts, pen = [], "M"
    for at, value in zip(x_axis.place(x), y_axis.place(y), strict=True):
        if math.isfinite(value):
            # h0: a point between two gaps shows as a round cap
            parts.append(f"{pen}{at:g} {value:g}{'h0' if pen == 'M' else ''}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def scatter_chart(title: str, targets: Array, predictions: Array) -> Chart:
    """Predicted against true numbers, of all rows."""
    targets, predictions = _finite(targets, predictions)
    both = np.concatenate([targets, predictions])
    x_axis, y_axis = Axis(both, X_PIXELS), Axis(both, Y_PIXELS)
    error = str(number(float(np.abs(targets - predictions).mean())))
    return Chart(
        title=title,
        alt=f"{title}: predicted against true for {len(targets)} rows; mean absolute error {error}",
        curves=[_points(x_axis, targets, y_axis, predictions, "true {}, predicted {}")],
        x_label="true",
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        guide=f"M{X_PIXELS[0]} {Y_PIXELS[0]}L{X_PIXELS[1]} {Y_PIXELS[1]}",
        remark=f"mean absolute error {error}",
        y_label="predicted",
    )


def residual_chart(title: str, targets: Array, predictions: Array) -> Chart:
    """How far off predictions are, against what was predicted, of all rows: around 0 everywhere where all is well."""
    targets, predictions = _finite(targets, predictions)
    residuals = predictions - targets
    x_axis = Axis(predictions, X_PIXELS)
    y_axis = Axis(np.append(residuals, 0.0), Y_PIXELS)
    bias, spread = number(float(residuals.mean())), number(float(residuals.std()))
    zero = float(y_axis.place(0.0))
    return Chart(
        title=title,
        alt=f"{title}: predicted minus true against predicted for {len(targets)} rows; mean {bias}, deviation {spread}",
        curves=[_points(x_axis, predictions, y_axis, residuals, "predicted {}, off by {}")],
        x_label="predicted",
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        guide=f"M{X_PIXELS[0]} {zero}L{X_PIXELS[1]} {zero}",
        remark=f"mean {bias}, deviation {spread}",
        y_label="predicted - true",
    )


def _finite(targets: Array, predictions: Array) -> tuple[Array, Array]:
    """Both in float64, of the rows where both are finite."""
    keep = np.isfinite(targets) & np.isfinite(predictions)
    if not keep.any():
        raise AbsentError("the predictions hold no finite value")
    return targets[keep].astype(float), predictions[keep].astype(float)


def _points(x_axis: Axis, x: Array, y_axis: Axis, y: Array, tooltip: str) -> Curve:
    """One dot a row with a tooltip; of many rows a path of dots, those within half a pixel of each other as one."""
    if len(x) <= MAX_SCATTER_POINTS:
        dots = [
            (float(x_axis.place(across)), float(y_axis.place(up)), tooltip.format(number(across), number(up)))
            for across, up in zip(x.tolist(), y.tolist(), strict=True)
        ]
        return Curve("test", "test", "", "", dots, "")
    places = np.stack([x_axis.place(x), y_axis.place(y)], 1)
    halves = np.unique(np.round(2 * places).astype(int), axis=0) / 2
    return Curve("test", "test", "".join(f"M{across:g} {up:g}h0" for across, up in halves.tolist()), "", [], "")
