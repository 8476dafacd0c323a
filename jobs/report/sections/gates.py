"""Gates: what each gate of a recurrent net does at each step of one row of the test (nn_models/inspection.py)."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.report.charts import Chart
from jobs.report.lines import Line, line_chart
from jobs.report.pictures import BLUE, data_uri
from jobs.report.sections.section import EVALUATION, Run, Section
from jobs.report.texts import Words

Array = NDArray[Any]

MAX_LAYERS = 4  # in each direction
MAX_UNITS = 64  # lines of a picture
MAX_WORDS, MAX_TOKENS = 48, 96  # of a text: so that each can be read
GRAY = (122, 130, 142)  # with transparency it reads well on light and on dark
ORDER = ("input", "forget", "output", "reset", "update")
COLOURS = ("train", "validation", "test", "other")
FEW = 8  # numbers of a step, each of which is drawn on a scale of its own


class Gate(NamedTuple):
    """A gate's picture: units from above to below, steps from left to right, the more open the bluer."""

    name: str
    picture: str
    mean: str


class Layer(NamedTuple):
    """The gates of a layer in one direction, and how open they are on average over units, by step."""

    name: str
    gates: list[Gate]
    chart: Chart


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    named = [(name, re.fullmatch(r"gates/(\d+)\.(\d+)\.(\w+)", name)) for name in tensors.shapes]
    found: dict[tuple[int, int], dict[str, str]] = {}
    for name, match in named:
        if match:
            found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = name
    if not found:
        return {}  # its cells have no gates
    steps = tensors["gates/steps"]
    words = Words.of(tensors)
    is_text = steps.ndim == 1
    num_steps = len(steps)
    if is_text:
        num_steps = min(num_steps, MAX_WORDS if words.unit == "words" else MAX_TOKENS)
    layers = []
    several = len(found) > 1
    for (layer, direction), gates in sorted(found.items())[: MAX_LAYERS * (1 + max(way for _, way in found))]:
        names = sorted(gates, key=lambda gate: (ORDER.index(gate) if gate in ORDER else len(ORDER), gate))
        values = {gate: tensors[gates[gate]] for gate in names}
        if direction:  # it reads from the end: each step back to where it belongs
            values = {gate: opened[::-1] for gate, opened in values.items()}
        where = f"Layer {layer + 1}{', from the end' * bool(direction)}" if several else ""
        layers.append(layer_of(where, {gate: opened[:num_steps] for gate, opened in values.items()}))
    return {
        "split": tensors.metadata.get("split", "test"),
        "layers": layers,
        "num_steps": num_steps,
        "cells": [words.cell(int(number)) for number in steps[:num_steps]] if is_text else [],
        "upright": words.unit in ("characters", "bytes"),
        "read": None if is_text else _strip(steps[:num_steps]),
        "lines": 0 if is_text else steps.shape[1],
        "more": len(found) - len(layers),
    }


def layer_of(name: str, gates: dict[str, Array]) -> Layer:
    """Gates by name, (steps, units) uint8 each. Units stand in one order for all: by the gate that tells them most."""
    means = {gate: opened.mean(0) for gate, opened in gates.items()}
    order = np.argsort(-max(means.values(), key=np.ptp), kind="stable")
    if len(order) > MAX_UNITS:
        order = order[np.linspace(0, len(order) - 1, MAX_UNITS).round().astype(int)]
    told = [
        Gate(gate, _picture(opened[:, order].T, BLUE), f"{100 * opened.mean() / 255:.0f}\u202f%")
        for gate, opened in gates.items()
    ]
    lines = [
        Line(gate, colour, opened.mean(1) / 255) for (gate, opened), colour in zip(gates.items(), COLOURS, strict=False)
    ]
    return Layer(name, told, line_chart("mean over units", lines, x_label="step", unit=True))


def _strip(steps: Array) -> str:
    """What is read at each step, (steps, numbers): each number a line from its least to its largest."""
    values = np.nan_to_num(steps.astype(np.float32)).T
    axis = 1 if len(values) <= FEW else None  # of few numbers each has a unit of its own
    low, high = values.min(axis, keepdims=True), values.max(axis, keepdims=True)
    return _picture((255 * (values - low) / np.maximum(high - low, 1e-12)).astype(np.uint8), GRAY)


def _picture(values: Array, colour: Sequence[int]) -> str:
    """(lines, steps) uint8: a colour, the less transparent the larger the value."""
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = values & 0xF0 | values >> 4  # sixteen steps are as many as can be told, and a third of the bytes
    return data_uri(pixels)


SECTION = Section(name="gates", template="gates.html", read=_read, title="The gates", file=EVALUATION)
