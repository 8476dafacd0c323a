"""Forecast: what was forecast for the test part beside what came, and beside what needs no net, step by step."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.report.charts import Chart
from jobs.report.files import Tensors, left_out, mapping
from jobs.report.lines import Line, line_chart
from jobs.report.sections.numbers import compared
from jobs.report.sections.section import EVALUATION, Run, Section
from nn_models.columns import Ahead
from nn_models.forecasting import SIMPLE, steps_back
from nn_models.signature import Signature
from nn_models.spec import validate

Array = NDArray[Any]

MAX_COLUMNS = 4  # that are drawn
MAX_WINDOWS = 300  # of a chart: in more, a season could not be seen
MAX_PAST = 3  # times as many steps as are forecast are shown of a window
NET, TRUE = "forecast", "true"
WAYS = (NET, "naive", "seasonal")  # as the evidence has their errors
COLOURS = {TRUE: "other", NET: "train", "naive": "second", "seasonal": "validation"}
WHO = {"the model": "", **{words: f"{name}_" for name, words in SIMPLE.items()}}
ERRORS = {"mse": "mean squared error", "mae": "mean absolute error", "mase": "mean absolute scaled error"}


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    with left_out(run.notes, "The forecasts", file=tensors.name):
        signature: Signature = validate(
            Signature, json.loads(tensors.metadata.get("signature", "{}")), prefix="signature"
        )
        ahead = getattr(signature["target"], "ahead", None)
        if not isinstance(ahead, Ahead):
            raise ValueError("its rows are of no series")
        ends, columns = tensors["ends"], ahead.names[:MAX_COLUMNS]
        return {
            "split": tensors.metadata.get("split", "test"),
            "windows": len(ends),
            "steps": ahead.steps,
            "season": ahead.season,
            "relative": ahead.relative,
            "columns": ahead.names,
            "errors": list(ERRORS.values()),
            "compared": compared(mapping(run.result.get("metrics")), WHO, tuple(ERRORS)),
            "course": [chart for place, name in enumerate(columns) for chart in _course(ends[..., place], name, ahead)],
            "by_step": [_by_step(tensors["errors"][..., place], name) for place, name in enumerate(columns)],
            "examples": _examples(tensors, ahead),
        }
    return {}


def _course(ends: Array, name: str, ahead: Ahead) -> list[Chart]:
    """True and forecast over the last windows, (windows, next or last step, true or forecast)."""
    first = max(0, len(ends) - MAX_WINDOWS)
    remark = f"the last {MAX_WINDOWS} windows" if first else ""
    charts = []
    for place, steps in enumerate(dict.fromkeys((1, ahead.steps))):
        lines = [
            Line(label, COLOURS[label], ends[first:, place, which], first + 1)
            for which, label in enumerate((TRUE, NET))
        ]
        title = f"{name}, {steps} step{'s' * (steps > 1)} ahead"
        charts.append(line_chart(title, lines, x_label="window", remark=remark))
    return charts


def _by_step(errors: Array, name: str) -> Chart:
    """The mean absolute error of each step ahead, (ways, steps)."""
    lines = [Line(way, COLOURS[way], values, 1) for way, values in zip(WAYS, errors, strict=False)]
    return line_chart(f"{name}: mean absolute error by step", lines, x_label="step ahead")


def _examples(tensors: Tensors, ahead: Ahead) -> list[Chart]:
    """Windows of the first column: what was read, what came, and what was forecast."""
    if "example_inputs" not in tensors:
        return []
    rows = tensors["example_rows"]
    order, shape = np.argsort(rows), (len(rows), ahead.steps, ahead.targets)
    past = tensors["example_inputs"][order, :, 0]
    true, said = (tensors[f"example_{name}"].reshape(shape)[order, :, 0] for name in ("targets", "predictions"))
    charts = []
    for read, came, forecast, row in zip(past, true, said, rows[order].tolist(), strict=True):
        shown = read[-MAX_PAST * max(ahead.steps, ahead.season or 1) :]
        whole = np.concatenate([shown, came])
        lines = [Line(TRUE, COLOURS[TRUE], whole, 1 - len(shown))]
        if ahead.season:
            simple = read[np.array(steps_back(ahead.steps, ahead.season))]
            lines.append(Line("seasonal", COLOURS["seasonal"], simple, 1))
        lines.append(Line(NET, COLOURS[NET], forecast, 1))
        charts.append(line_chart(f"{ahead.names[0]}, window {row + 1}", lines, x_label="step"))
    return charts


SECTION = Section(
    name="forecast",
    template="forecast.html",
    read=_read,
    title="The forecasts",
    file=EVALUATION,
    figures=("mae", "naive_mae", "seasonal_mae", "linear_mae", "mase", "mse"),
)
