"""The report of a run: reads its directory, writes one self-contained HTML page of figures, curves and pictures."""

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jinja2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from cluster.storage import Folder
from nn_models.errors import UserError

Array = NDArray[Any]

MAX_CHARTS = 24
MAX_CURVE_POINTS = 400  # longer curves are averaged in pieces: the page stays small and the line readable
MAX_DOTS = 60  # points with a tooltip of their own
MAX_CLASSES_IN_MATRIX = 30  # more are drawn as a picture, without numbers
MAX_CLASSES_IN_TABLE = 50
MAX_CONFUSION_PIXELS = 250  # of more classes neighbours share a pixel: single ones could not be seen
MAX_EXAMPLES = 24  # of the right ones, and of the wrong ones
MAX_EXAMPLE_PIXELS = 128
MAX_FILTERS = 64
MAX_OUTPUTS = 6
MAX_SCATTER_POINTS = 800

SPLITS = ("train", "validation", "test")
SHOWN_LAST = ("learning_rate", "grad_norm", "rows_per_s")
NOT_METRICS = ("step", "epoch", "time_s")
BROKEN = (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError, yaml.YAMLError, SafetensorError)

BLUE, RED = (47, 99, 214), (214, 69, 47)  # with transparency both read well on light and on dark


def write_report(run: str) -> str:
    """Write RUN/report.html from what the run left behind, and return its path.

    `run` is a local path or a URI. Nothing in the run is executed: JSON, YAML (safe) and safetensors only. Whatever
    is missing or broken is left out of the page and named at its end.
    Raises UserError where the directory is no run or cannot be written.
    """
    folder = Folder(run)
    _refuse_what_is_no_run(folder)
    notes: list[str] = []
    recipe: dict[str, Any] = {}
    recipe_text = None
    with _left_out(notes, "The recipe", file="recipe.yaml"):
        recipe_text = folder.read_bytes("recipe.yaml").decode(errors="replace")
        recipe = _mapping(yaml.safe_load(recipe_text))
    result: dict[str, Any] = {}
    with _left_out(notes, "The final result", file="result.json"):
        result = _mapping(json.loads(folder.read_bytes("result.json")))
    environment: list[tuple[str, str]] = []
    with _left_out(notes, "The environment", file="environment.json"):
        environment = list(_flat(_mapping(json.loads(folder.read_bytes("environment.json")))))
    best = _mapping(result.get("best"))
    charts: list[Chart] = []
    with _left_out(notes, "The curves", file="metrics.jsonl"):
        records, num_unreadable = _records(folder.read_bytes("metrics.jsonl"))
        if num_unreadable:
            notes.append(f"Lines of metrics.jsonl that cannot be read: {num_unreadable}.")
        charts = _metric_charts(records, best_step=best.get("step"))
        if not charts:
            raise _AbsentError("metrics.jsonl holds no finite value")
        if len(charts) > MAX_CHARTS:
            notes.append(f"The curves: only {MAX_CHARTS} of the {len(charts)} metrics are drawn.")
    evaluation: dict[str, Any] = dict.fromkeys(("num_classes", "scatter", "right", "wrong"))
    image_shape = None
    with _left_out(notes, "The predictions", file="evaluation.safetensors"):
        tensors = _Tensors(folder, "evaluation.safetensors")
        image_shape = _image_shape(tensors)
        evaluation |= _evaluation(tensors, notes)
    filters = None
    with _left_out(notes, "The learned filters", file="model/model.safetensors"):
        filters = _first_layer(_Tensors(folder, "model/model.safetensors"), image_shape)

    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(template)
    kinds = {section: _mapping(recipe.get(section)).get("kind") for section in ("model", "data", "objective")}
    html = page.render(
        name=str(recipe.get("name") or folder.path.rsplit("/", 1)[-1]),
        where=str(folder),
        kinds=kinds,
        status=str(result.get("status") or "unfinished"),
        error=result.get("error"),
        figures=_figures(_mapping(result.get("metrics"))),
        facts=[(label, value) for label, value in _facts(recipe, result) if value],
        charts=charts[:MAX_CHARTS],
        best=_words(str(best["metric"])) if best.get("metric") else None,
        evaluation=evaluation,
        filters=filters,
        recipe=recipe_text,
        environment=environment,
        result=json.dumps(result, indent=2, ensure_ascii=False) if result else None,
        notes=notes,
    )
    try:
        folder.write_bytes("report.html", html.lstrip().encode(errors="replace"))  # a name may hold a lone surrogate
    except OSError as error:
        raise UserError(f"{folder}/report.html: cannot be written ({error}); make the directory writable") from None
    return f"{folder}/report.html"


# --------------------------------------------------------------------------------------------------------- reading


def _refuse_what_is_no_run(folder: Folder) -> None:
    try:
        names = folder.names()
    except OSError as error:
        raise UserError(f"{folder}: not a directory that can be read ({error}); name a run's directory") from None
    if {"recipe.yaml", "result.json", "metrics.jsonl"} & set(names):
        return
    if not folder.exists():
        raise UserError(f"{folder}: no such directory; name the directory of a run, as given to --run")
    runs = [name for name in names[:100] if (folder / name).exists("recipe.yaml")]
    fix = f"name one of the runs in it: {', '.join(runs[:5])}" if runs else "name the directory given to --run"
    raise UserError(f"{folder}: not a run (it holds no recipe.yaml, metrics.jsonl or result.json); {fix}")


class _AbsentError(Exception):
    """Nothing is wrong, but this run has no such part."""


@contextmanager
def _left_out(notes: list[str], part: str, *, file: str) -> Iterator[None]:
    """No problem inside fails the report: it becomes a note on the page."""
    try:
        yield
    except _AbsentError as reason:
        notes.append(f"{part}: {reason}.")
    except FileNotFoundError:
        notes.append(f"{part}: the run has no {file}.")
    except BROKEN as error:
        notes.append(f"{part}: {file} cannot be read ({type(error).__name__}: {str(error)[:300]}).")


class _Tensors:
    """A safetensors file read piecewise: the first layer of a large model costs only its own bytes."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        with folder.filesystem.open_input_file(folder.full(name)) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:  # the format's own limit
                raise ValueError("not a safetensors file")
            self.header = _mapping(json.loads(file.read(length)))
        self.metadata: dict[str, Any] = _mapping(self.header.pop("__metadata__", None))
        self.shapes: dict[str, tuple[int, ...]] = {key: tuple(entry["shape"]) for key, entry in self.header.items()}
        self.start = 8 + length

    def __contains__(self, key: str) -> bool:
        return key in self.header

    def __getitem__(self, key: str) -> Array:
        begin, end = self.header[key]["data_offsets"]
        with self.folder.filesystem.open_input_file(self.folder.full(self.name)) as file:
            content = file.read_at(end - begin, self.start + begin)
        if self.header[key]["dtype"] == "BF16":  # unknown to NumPy: the upper half of a float32
            upper = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
            return upper.view(np.float32).reshape(self.shapes[key])
        header = json.dumps({key: self.header[key] | {"data_offsets": [0, end - begin]}}).encode()
        array: Array = load(len(header).to_bytes(8, "little") + header + content)[key]
        return array


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines in order of their steps, and how many are unreadable; a step repeated after a restart counts once."""
    records: dict[tuple[float, str, bool], dict[str, Any]] = {}
    num_unreadable = 0
    for line in filter(None, content.splitlines()):
        try:
            record = json.loads(line)
            key = (record["step"], str(record.get("split", "train")), bool(record.get("end_of_epoch")))
            if not _is_number(key[0]):
                raise TypeError
        except (*BROKEN, AttributeError):  # a run that was killed leaves half a line
            num_unreadable += 1
            continue
        records[key] = record
    return [records[key] for key in sorted(records)], num_unreadable


# -------------------------------------------------------------------------------------------------------- headline


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers that matter most: of the test split where there is one, the loss after the others."""
    for split in reversed(SPLITS):
        found = {name: value for name, value in metrics.items() if name.startswith(f"{split}/") and _is_number(value)}
        if found:
            names = sorted(found, key=lambda name: name.endswith("/loss"))
            return [(_words(name), _figure(name, found[name])) for name in names[:4]]
    return []


def _facts(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    train, best = _mapping(recipe.get("train")), _mapping(result.get("best"))
    yield "parameters", _number(result.get("num_parameters"))
    for section in ("optimizer", "schedule"):
        kind = _mapping(recipe.get(section)).get("kind")
        yield section, None if kind is None else str(kind)
    workers = result.get("num_workers", result.get("world_size"))
    yield "workers", "none (in one process)" if workers == 0 else _number(workers)
    done, planned = _number(result.get("epochs")), _number(train.get("epochs"))
    yield "epochs", f"{done} of {planned}" if done and planned and done != planned else done or planned
    yield "steps", _number(result.get("steps"))
    yield "global batch", _number(train.get("global_batch_size"))
    yield "duration", _duration(result.get("wall_s"))
    yield "to the first step", _duration(result.get("time_to_first_step_s"))
    yield "rows per second", _number(result.get("rows_per_s"))
    yield "restarts", _number(result.get("restarts"))
    if _is_number(best.get("value")):
        name = str(best.get("metric", "value"))
        epoch = f", epoch {_number(best['epoch'] + 1)}" if _is_number(best.get("epoch")) else ""
        yield f"best {_words(name)}", f"{_figure(name, best['value'])}{epoch}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100  # so neither NaN


def _number(value: Any) -> str | None:
    if not _is_number(value):
        return None
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}".replace(",", "\u202f")  # narrow no-break space
    return re.sub(r"e([+-])0*", lambda match: f"e{match[1].strip('+')}", f"{value:.4g}")


def _words(name: str) -> str:
    return re.sub("per s$", "per second", name.replace("/", " ").replace("_", " "))


def _figure(name: str, value: float) -> str:
    return f"{100 * value:.2f}\u202f%" if name.endswith("accuracy") and 0 <= value <= 1 else str(_number(value))


def _duration(seconds: Any) -> str | None:
    if not _is_number(seconds):
        return None
    if seconds < 60:
        return f"{seconds:.3g}\u202fs" if seconds < 10 else f"{seconds:.0f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u202fmin {rest:02}\u202fs"
    return f"{minutes // 60:,}\u202fh {minutes % 60:02}\u202fmin"


# ---------------------------------------------------------------------------------------------------------- charts


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
        return str(_number(float(f"{value:.3g}"))) if size < 1 else f"{value:.3g}".replace("e+", "e")
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if unit == 'M' else 1e3):.6g}{unit}"
    return f"{value + 0.0:.9g}"


def _metric_charts(records: Sequence[Mapping[str, Any]], best_step: Any) -> list[Chart]:
    """One chart for each metric, against epochs where the lines tell how long an epoch is, else against steps."""
    ends = [record for record in records if record.get("end_of_epoch") and _is_number(record.get("epoch"))]
    steps_per_epoch = ends[-1]["step"] / (ends[-1]["epoch"] + 1) if ends else 0
    scale, x_label = (steps_per_epoch, "epoch") if steps_per_epoch > 0 else (1, "step")
    best_x = best_step / scale if _is_number(best_step) else None
    names = {name for record in records for name, value in record.items() if _is_number(value)} - set(NOT_METRICS)
    order = {name: place for place, name in enumerate(SHOWN_LAST)}
    charts = []
    for name in sorted(names, key=lambda name: (order.get(name, -1), name != "loss", name)):
        points: dict[str, list[tuple[float, float, bool]]] = {}
        for record in records:
            if name in record:
                value = float(record[name]) if _is_number(record[name]) else math.nan
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
                f"{split}, {x_label} {at:.4g}: {_figure(name, value)}",
            )
            for at, value in zip(x, y, strict=True)
            if math.isfinite(value) and len(x) <= MAX_DOTS
        ]
        faint_path = _path(x_axis, y_axis, *_thinned(faint)) if faint else ""
        curves.append(Curve(split, _path(x_axis, y_axis, x, y), faint_path, dots, _figure(name, known[-1])))
        first, last = _figure(name, known[0]), _figure(name, known[-1])
        told.append(f"{split} {last}" if len(known) == 1 else f"{split} from {first} to {last}")
    num_lost = len(everything) - len(finite)
    remarks = ["logarithmic"] * log + [f"{num_lost} not finite"] * bool(num_lost)
    best = best_x is not None and x_axis.holds(best_x)
    title = _words(name)
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


def _scatter_chart(title: str, targets: Array, predictions: Array) -> Chart:
    keep = np.isfinite(targets) & np.isfinite(predictions)
    if not keep.any():
        raise _AbsentError("the predictions hold no finite value")
    targets, predictions = targets[keep].astype(float), predictions[keep].astype(float)
    chosen = np.linspace(0, len(targets) - 1, min(len(targets), MAX_SCATTER_POINTS)).astype(int)
    both = np.concatenate([targets, predictions])
    x_axis, y_axis = _Axis(both, X_PIXELS), _Axis(both, Y_PIXELS)
    dots = [
        (float(x_axis.place(x)), float(y_axis.place(y)), f"true {_number(x)}, predicted {_number(y)}")
        for x, y in zip(targets[chosen].tolist(), predictions[chosen].tolist(), strict=True)
    ]
    error = str(_number(float(np.abs(targets - predictions).mean())))
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


# ------------------------------------------------------------------------------------------------------ predictions


def _evaluation(tensors: _Tensors, notes: list[str]) -> dict[str, Any]:
    names = json.loads(tensors.metadata.get("class_names", "[]"))

    def class_name(index: int) -> str:
        return str(names[index]) if 0 <= index < len(names) else str(index)

    page: dict[str, Any] = {"split": str(tensors.metadata.get("split", "test"))}
    file = tensors.name
    if "confusion" in tensors:
        with _left_out(notes, "The confusion matrix", file=file):
            page |= _confusion(tensors["confusion"], class_name)
    with _left_out(notes, "The examples", file=file):
        if "example_predictions" not in tensors:
            raise _AbsentError("the run kept none")
        targets, predictions = tensors["example_targets"], tensors["example_predictions"]
        if targets.shape != predictions.shape or not predictions.size:
            raise _AbsentError(f"targets of shape {targets.shape} and predictions of shape {predictions.shape}")
        if predictions.dtype.kind == "f" and predictions.ndim <= 2:
            outputs = zip(targets.reshape(len(targets), -1).T, predictions.reshape(len(targets), -1).T, strict=True)
            page["scatter"] = [
                _scatter_chart(f"output {place + 1}", *pair)
                for place, pair in enumerate(outputs)
                if place < MAX_OUTPUTS
            ]
        elif predictions.ndim == 1:
            page |= _examples(tensors, targets, predictions, class_name)
        else:
            raise _AbsentError(f"predictions of shape {predictions.shape} are neither classes nor numbers")
    return page


def _confusion(counts: Array, class_name: Callable[[int], str]) -> dict[str, Any]:
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"confusion has the shape {counts.shape}")
    num_classes = len(counts)
    right, num_true, num_predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    page: dict[str, Any] = {
        "num_classes": num_classes,
        "matrix": None,
        "picture": None,
        "merged": num_classes > MAX_CONFUSION_PIXELS,
    }
    if num_classes <= MAX_CLASSES_IN_MATRIX:
        shares = counts / np.maximum(num_true, 1)[:, None]
        page["matrix"] = [
            [(int(count), float(share)) for count, share in zip(*row, strict=True)]
            for row in zip(counts, shares, strict=True)
        ]
        page["names"] = [class_name(index) for index in range(num_classes)]
    else:
        page["picture"] = _confusion_picture(counts)

    def ratio(part: Array, whole: Array) -> Array:
        return np.divide(part, whole, out=np.full(num_classes, np.nan), where=whole > 0)

    precision, recall = ratio(right, num_predicted), ratio(right, num_true)
    shown = np.arange(num_classes)
    if num_classes > MAX_CLASSES_IN_TABLE:  # the worst are worth a look
        shown = np.lexsort((shown, recall))[:10]
    page["all_classes"] = len(shown) == num_classes
    page["classes"] = [
        (class_name(int(index)), float(precision[index]), float(recall[index]), int(num_true[index])) for index in shown
    ]
    mistakes = counts - np.diag(right)
    places = np.argwhere(mistakes > 0)
    order = np.argsort(-mistakes[tuple(places.T)], kind="stable")[:8]
    page["mistakes"] = [
        (
            class_name(true),
            class_name(predicted),
            int(mistakes[true, predicted]),
            mistakes[true, predicted] / num_true[true],
        )
        for true, predicted in places[order].tolist()
    ]
    return page


def _confusion_picture(counts: Array) -> str:
    """Share of each true class (rows) by predicted class: blue on the diagonal, red beside it, clear where none."""
    if len(counts) > MAX_CONFUSION_PIXELS:
        edges = np.linspace(0, len(counts), MAX_CONFUSION_PIXELS, endpoint=False).astype(int)
        counts = np.add.reduceat(np.add.reduceat(counts, edges, axis=0), edges, axis=1)
    shares = counts / np.maximum(counts.sum(1), 1)[:, None]
    pixels = np.empty((*counts.shape, 4), np.uint8)
    pixels[..., :3] = RED
    pixels[np.eye(len(counts), dtype=bool), :3] = BLUE
    pixels[..., 3] = 255 * np.sqrt(np.clip(shares, 0, 1))
    return _data_uri(pixels)


class Example(NamedTuple):
    """One row of the evaluated split: its picture, if it is one, and what the model made of it."""

    picture: str | None
    true: str
    predicted: str
    confidence: str | None


def _examples(
    tensors: _Tensors, targets: Array, predictions: Array, class_name: Callable[[int], str]
) -> dict[str, list[Example]]:
    """The right ones as they come, the wrong ones with the surest first: they teach most."""
    confidences = tensors["example_confidences"] if "example_confidences" in tensors else np.full(len(targets), np.nan)
    right = np.flatnonzero(targets == predictions)[:MAX_EXAMPLES]
    wrong = np.flatnonzero(targets != predictions)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")][:MAX_EXAMPLES]
    pictures: dict[int, str] = {}
    if _image_shape(tensors):
        chosen = np.concatenate([right, wrong])
        pictures = dict(zip(chosen.tolist(), _pictures(tensors["example_inputs"][chosen]), strict=True))

    def example(row: int) -> Example:
        confidence = float(confidences[row])
        return Example(
            picture=pictures.get(row),
            true=class_name(int(targets[row])),
            predicted=class_name(int(predictions[row])),
            confidence=f"{100 * confidence:.0f}\u202f%" if math.isfinite(confidence) else None,
        )

    return {"right": [example(int(row)) for row in right], "wrong": [example(int(row)) for row in wrong]}


# -------------------------------------------------------------------------------------------------------- pictures


def _image_shape(tensors: _Tensors) -> tuple[int, ...] | None:
    """(channels, height, width) of the examples; None where they are no pictures."""
    shape = tensors.shapes.get("example_inputs", ())
    return shape[1:] if len(shape) == 4 and min(shape) > 0 and min(shape[2:]) > 1 else None


def _pictures(images: Array) -> list[str]:
    """Data URIs of [n, channels, height, width]: 3 channels as RGB, else the first as gray."""
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images[:, 0]
    if images.dtype != np.uint8:
        images = np.nan_to_num(images.astype(np.float32), posinf=0.0, neginf=0.0)
        low, high = min(images.min(initial=0.0), 0.0), images.max(initial=0.0)
        if low < 0 or high > 1:  # normalised rows: stretch what is there
            low, high = images.min(), images.max()
        else:
            low, high = 0.0, 1.0
        images = ((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return [_data_uri(image) for image in images]


def _data_uri(pixels: Array) -> str:
    """A picture of [height, width] or [height, width, 3 or 4] uint8, large photographs made smaller."""
    image, buffer, kind = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO(), "png"
    if image.mode != "RGBA" and max(image.size) > MAX_EXAMPLE_PIXELS // 2:
        image.thumbnail((MAX_EXAMPLE_PIXELS, MAX_EXAMPLE_PIXELS))
        kind = "jpeg"
    image.save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {"compress_level": 3}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _first_layer(tensors: _Tensors, image_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """The filters that look at the picture itself: of the first convolution, or of the first dense layer."""

    def priority(name: str) -> tuple[Any, ...]:
        numbered = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
        other_channels = image_shape is not None and tensors.shapes[name][1] != image_shape[0]
        return (bool(re.search("decoder|generator", name)), other_channels, numbered)

    num_inputs = math.prod(image_shape or (0,))
    shapes = tensors.shapes
    names = [name for name, shape in shapes.items() if len(shape) == 4 and min(shape) > 0 and min(shape[2:]) > 1]
    if not names:
        names = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] == num_inputs and shape[0]]
    if not names:
        raise _AbsentError("no layer of this model looks at pictures")
    name = min(names, key=priority)
    weights = np.nan_to_num(tensors[name][:MAX_FILTERS].astype(np.float32), posinf=0.0, neginf=0.0)
    if weights.ndim == 2:
        weights = weights.reshape(-1, *(image_shape or ()))
    scale = float(np.quantile(np.abs(weights), 0.995)) or 1.0  # one scale for all: a weak filter looks weak
    weights = np.clip(weights / scale, -1, 1)
    if weights.shape[1] == 3:
        pixels = (127.5 + 127.5 * weights).astype(np.uint8).transpose(0, 2, 3, 1)
    else:
        signed = weights[:, 0]
        pixels = np.empty((*signed.shape, 4), np.uint8)
        pixels[..., :3] = np.where(signed[..., None] > 0, BLUE, RED)
        pixels[..., 3] = 255 * np.abs(signed)
    return {
        "name": name,
        "shape": " x ".join(map(str, shapes[name])),
        "num_filters": shapes[name][0],
        "signed": weights.shape[1] != 3,
        "channels": weights.shape[1],
        "pictures": [_data_uri(picture) for picture in pixels],
    }
