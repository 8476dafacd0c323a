"""Gradients: how much of a small change of the state comes through to the last step (nn_models/gradients.py)."""

import re
from typing import Any

from jobs.report.charts import Chart
from jobs.report.files import AbsentError, Tensors
from jobs.report.lines import Line, line_chart
from jobs.report.sections.section import EVALUATION, Run, Section

MAX_CHARTS = 8
TRAINED = "trained"
# The lines in their order: net -> its words and its colour.
NETS = {
    TRAINED: ("trained", "train"),
    "rnn": ("untrained rnn", "validation"),
    "lstm": ("untrained lstm", "test"),
    "gru": ("untrained gru", "other"),
}
STATES = {"h": "dh[T] / dh[t]", "c": "cell: dc[T] / dc[t]"}


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    charts = gradient_charts(run.evaluation)
    if not charts:
        raise AbsentError("the run kept none")
    if len(charts) > MAX_CHARTS:
        run.notes.append(f"The gradients: only {MAX_CHARTS} of {len(charts)} charts are drawn.")
    return {"charts": charts[:MAX_CHARTS], "cell": any(STATES["c"] in chart.title for chart in charts)}


def gradient_charts(tensors: Tensors) -> list[Chart]:
    """One for each layer, direction and state of the trained net; layers are named where there are several."""
    named = (re.fullmatch(rf"gradients/{TRAINED}/(\d+)\.(\d+)\.(\w+)", name) for name in tensors.shapes)
    places = sorted((int(match[1]), int(match[2]), match[3]) for match in named if match)
    places.sort(key=lambda place: place[2], reverse=True)  # all h first
    several = {place[0] for place in places} != {0} or any(place[1] for place in places)
    charts = []
    for layer, direction, state in places:
        lines = [
            Line(label, colour, tensors[key])
            for net, (label, colour) in NETS.items()
            if (key := f"gradients/{net}/{layer}.{direction}.{state}") in tensors
        ]
        where = f"layer {layer + 1}{', from the end' * bool(direction)}: " if several else ""
        title = where + STATES.get(state, state)
        charts.append(line_chart(title, lines, x_label="steps back, T - t", log=True))
    return charts


SECTION = Section(
    name="gradients", template="gradients.html", read=_read, title="The gradients through time", file=EVALUATION
)
