"""Charts: curves and scatter plots as paths of inline SVG; importing matplotlib would take longer than all of it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.report.files import AbsentError, is_number

Array = NDArray[Any]

MAX_CHARTS = 24
MAX_CURVE_POINTS = 400  # longer curves are averaged in pieces: the page stays small and the line readable
MAX_DOTS = 60  # points with a tooltip of their own
MAX_SCATTER_POINTS = 800
SPLITS = ("train", "validation", "test")
SHOWN_LAST = ("learning_rate", "grad_norm", "rows_per_s")
NOT_METRICS = ("step", "epoch", "time_s")


def number(value: Any) -> str | None:
    """As people read it; None for what is no number."""
    if not is_number(value):
        return None
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}".replace(",", "\u202f")  # narrow no-break space
    return re.sub(r"e([+-])0*", lambda match: f"e{match[1].strip('+')}", f"{value:.4g}")


def words(name: str) -> str:
    """A metric's name in words."""
    return re.sub("per s$", "per second", name.replace("/", " ").replace("_", " "))


def figure(name: str, value: float) -> str:
    """A metric's value: accuracies in per cent."""
    return f"{100 * value:.2f}\u202f%" if name.endswith("accuracy") and 0 <= value <= 1 else str(number(value))


class Curve(NamedTuple):
    """One split's line, in the chart's coordinates."""

    split: str
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


WIDTH, HEIGHT = 400, 230
X_PIXELS, Y_PIXELS = (50.0, 390.0), (196.0, 10.0)


class _Axis:
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


def metric_charts(records: Sequence[Mapping[str, Any]], best_step: Any) -> list[Chart]:
    """One chart for each metric, against epochs where the lines tell how long an epoch is, else against steps."""
    ends = [record for record in records if record.get("end_of_epoch") and is_number(record.get("epoch"))]
    steps_per_epoch = ends[-1]["step"] / (ends[-1]["epoch"] + 1) if ends else 0
    scale, x_label = (steps_per_epoch, "epoch") if steps_per_epoch > 0 else (1, "step")
    best_x = best_step / scale if is_number(best_step) else None
    names = {name for record in records for name, value in record.items() if is_number(value)} - set(NOT_METRICS)
    order = {name: place for place, name in enumerate(SHOWN_LAST)}
    charts = []
    for name in sorted(names, key=lambda name: (order.get(name, -1), name != "loss", name)):
        points: dict[str, list[tuple[float, float, bool]]] = {}
        for record in records:
            if name in record:
                value = float(record[name]) if is_number(record[name]) else math.nan
                split = str(record.get("split", "train"))
                points.setdefault(split, []).append((record["step"] / scale, value, bool(record.get("end_of_epoch"))))
        charts.append(_metric_chart(name, points, x_label, best_x))
    return charts


def _metric_chart(
    name: str, points: Mapping[str, Sequence[tuple[float, float, bool]]], x_label: str, best_x: float | None
) -> Chart:
    """`points` are (x, value, whether it is an epoch's average) of each split, in order of x."""
    everything = np.array([point for split in points.values() for point in split], dtype=float)
    finite = everything[np.isfinite(everything[:, 1])]
    low, high = finite[:, 1].min(), finite[:, 1].max()
    log = bool(re.search("loss|grad_norm|perplexity", name) and low > 0 and high / low >= 100)
    x_axis, y_axis = _Axis(everything[:, 0], X_PIXELS, whole=True), _Axis(finite[:, 1], Y_PIXELS, log=log)
    curves = []
    told = []
    for split in sorted(points, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS)):
        line = list(points[split])
        averages = [point for point in line if point[2]]
        intervals = [point for point in line if not point[2]]
        faint: list[tuple[float, float, bool]] = []
        if intervals and name != "learning_rate":  # a learning rate is no average of anything
            line, faint = (averages, intervals) if len(averages) > 1 else (intervals, [])
        known = [value for _, value, _ in line if math.isfinite(value)]
        if not known:
            continue
        x, y = _thinned(line)
        dots = [
            (
                float(x_axis.place(at)),
                float(y_axis.place(value)),
                f"{split}, {x_label} {at:.4g}: {figure(name, value)}",
            )
            for at, value in zip(x, y, strict=True)
            if math.isfinite(value) and len(x) <= MAX_DOTS
        ]
        faint_path = _path(x_axis, y_axis, *_thinned(faint)) if faint else ""
        curves.append(Curve(split, _path(x_axis, y_axis, x, y), faint_path, dots, figure(name, known[-1])))
        first, last = figure(name, known[0]), figure(name, known[-1])
        told.append(f"{split} {last}" if len(known) == 1 else f"{split} from {first} to {last}")
    num_lost = len(everything) - len(finite)
    remarks = ["logarithmic"] * log + [f"{num_lost} not finite"] * bool(num_lost)
    best = best_x is not None and x_axis.holds(best_x)
    title = words(name)
    return Chart(
        title=title,
        alt=f"{title} by {x_label}: {'; '.join(told)}",
        curves=curves,
        x_label=x_label,
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        guide=f"M{x_axis.place(best_x)} {Y_PIXELS[0]}V{Y_PIXELS[1]}" if best else "",
        remark=", ".join(remarks),
    )


def _thinned(points: Sequence[tuple[float, float, bool]]) -> tuple[Array, Array]:
    x, y, _ = np.array(points, dtype=float).T
    if len(x) <= MAX_CURVE_POINTS:
        return x, y
    pieces = np.linspace(0, len(x), MAX_CURVE_POINTS, endpoint=False).astype(int)
    sizes = np.diff(pieces, append=len(x))
    return np.add.reduceat(x, pieces) / sizes, np.add.reduceat(y, pieces) / sizes  # a NaN keeps its piece out


def _path(x_axis: _Axis, y_axis: _Axis, x: Array, y: Array) -> str:
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
    """Predicted against true numbers."""
    keep = np.isfinite(targets) & np.isfinite(predictions)
    if not keep.any():
        raise AbsentError("the predictions hold no finite value")
    targets, predictions = targets[keep].astype(float), predictions[keep].astype(float)
    chosen = np.linspace(0, len(targets) - 1, min(len(targets), MAX_SCATTER_POINTS)).astype(int)
    both = np.concatenate([targets, predictions])
    x_axis, y_axis = _Axis(both, X_PIXELS), _Axis(both, Y_PIXELS)
    dots = [
        (float(x_axis.place(x)), float(y_axis.place(y)), f"true {number(x)}, predicted {number(y)}")
        for x, y in zip(targets[chosen].tolist(), predictions[chosen].tolist(), strict=True)
    ]
    error = str(number(float(np.abs(targets - predictions).mean())))
    return Chart(
        title=title,
        alt=f"{title}: predicted against true for {len(dots)} rows; mean absolute error {error}",
        curves=[Curve("test", "", "", dots, "")],
        x_label="true",
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        guide=f"M{X_PIXELS[0]} {Y_PIXELS[0]}L{X_PIXELS[1]} {Y_PIXELS[1]}",
        remark=f"mean absolute error {error}",
    )
