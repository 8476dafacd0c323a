"""Lines: charts of values against places that are no steps of training: distances in time, steps of a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jobs.report.charts import MAX_DOTS, X_PIXELS, Y_PIXELS, Array, Axis, Chart, Curve, number, path_of, thinned
from jobs.report.files import AbsentError

SMALLEST = 1e-12  # on a logarithmic axis: what is below is not drawn, and would flatten all that is above


class Line(NamedTuple):
    """The values of one line at whole numbers, `first` and on; `colour` is one that macros.html knows."""

    label: str
    colour: str
    values: Array
    first: int = 0

    @property
    def places(self) -> Array:
        """Where the values are."""
        return np.arange(self.first, self.first + len(self.values))


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str, log: bool = False, unit: bool = False, remark: str = ""
) -> Chart:
    """Values against their places. On a logarithmic axis those below SMALLEST are left out; `unit` is from 0 to 1.

    Raises AbsentError where there is no finite value.
    """
    shown = [np.where(line.values >= SMALLEST, line.values, np.nan) if log else line.values for line in lines]
    shown = [values.astype(float) for values in shown]
    everything = np.concatenate([values[np.isfinite(values)] for values in shown])
    if not everything.size:
        raise AbsentError(f"{title} holds no finite value")
    x_axis = Axis(np.concatenate([line.places for line in lines]), X_PIXELS, whole=True)
    y_axis = Axis(np.array([0.0, 1.0]) if unit else everything, Y_PIXELS, log=log)
    curves, told = [], []
    for line, values in zip(lines, shown, strict=True):
        x, y = thinned([(float(at), float(value), False) for at, value in zip(line.places, values, strict=True)])
        dots = [
            (float(x_axis.place(at)), float(y_axis.place(value)), f"{line.label}, {x_label} {at:g}: {number(value)}")
            for at, value in zip(x.tolist(), y.tolist(), strict=True)
            if np.isfinite(value) and len(x) <= MAX_DOTS
        ]
        last = number(float(line.values[-1])) or "-"
        curves.append(Curve(line.label, line.colour, path_of(x_axis, y_axis, x, y), "", dots, last))
        told.append(f"{line.label} from {number(float(line.values[0]))} to {last}")
    cut = log and any((line.values < SMALLEST).any() for line in lines)
    remarks = [remark] * bool(remark) + ["logarithmic"] * log + [f"from {SMALLEST:g} on"] * bool(cut)
    return Chart(
        title=title,
        alt=f"{title} by {x_label}: {'; '.join(told)}",
        curves=curves,
        x_label=x_label,
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        guide="",
        remark=", ".join(remarks),
    )
