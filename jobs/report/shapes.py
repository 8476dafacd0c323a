"""Shapes: histograms, and dots in the colours of their classes, as paths of inline SVG."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jobs.report.charts import X_PIXELS, Y_PIXELS, Array, Axis, number
from jobs.report.files import AbsentError

# Ten colours that are told from one another on light and on dark (Tableau 10), and one for whatever is beyond them.
PALETTE = (
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#86bcb6",
)  # fmt: skip
BEYOND = "#8a8f98"
NUM_BINS = 40
HIGHEST = 0.995  # the share of values that a histogram of many sizes shows; the rest stand in its last bar
WIDEST = 30.0  # times a sort's middle value that the highest is, from which on only a logarithmic axis shows both


class Group(NamedTuple):
    """Dots of one class, or bars of one sort."""

    label: str
    colour: str
    path: str


class Shapes(NamedTuple):
    """What the template needs to draw groups as SVG; `guide` is the path of a line to point out, and what it is."""

    title: str
    alt: str
    groups: list[Group]
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_label: str
    y_ticks: list[tuple[float, str]]
    guide: str = ""
    guide_label: str = ""
    bars: bool = False
    remark: str = ""


def colour_of(place: int) -> str:
    """Of the class at this place."""
    return PALETTE[place] if place < len(PALETTE) else BEYOND


def dots(title: str, x: Array, y: Array, labels: Array | None, names: Sequence[str], *, axes: Sequence[str]) -> Shapes:
    """Rows at (x, y), each in its class's colour. Those within half a pixel of each other are drawn as one."""
    keep = np.isfinite(x) & np.isfinite(y)
    if not keep.any():
        raise AbsentError(f"{title} hold no finite value")
    x, y = x[keep], y[keep]
    classes = np.zeros(len(x), int) if labels is None else labels[keep]
    x_axis, y_axis = Axis(x, X_PIXELS), Axis(y, Y_PIXELS)
    groups = []
    for place in np.unique(classes).tolist():
        of = classes == place
        places = np.stack([x_axis.place(x[of]), y_axis.place(y[of])], 1)
        halves = np.unique(np.round(2 * places).astype(int), axis=0) / 2
        path = "".join(f"M{across:g} {up:g}h0" for across, up in halves.tolist())
        name = names[place] if place < len(names) else str(place)
        groups.append(Group("" if labels is None else name, colour_of(place), path))
    told = f" of {len(groups)} classes" if labels is not None else ""
    alt = f"{title}: {len(x)} rows{told}, by {axes[0]} and {axes[1]}"
    return Shapes(title, alt, groups, axes[0], x_axis.ticks, axes[1], y_axis.ticks)


def histogram(
    title: str,
    sorts: Sequence[tuple[str, str, Array]],
    *,
    x_label: str,
    guide: tuple[float, str] | None = None,
    highest: float = HIGHEST,
) -> Shapes:
    """Shares of rows by value, of each (label, colour, values) by itself; `guide` is a value to point out.

    Values beyond what the share `highest` of all lie below are counted in the last bar. Where positive values differ
    so much that most would stand in the first bars, the axis is logarithmic.
    """
    sorts = [(label, colour, values[np.isfinite(values)]) for label, colour, values in sorts]
    everything = np.concatenate([values for _, _, values in sorts])
    if not everything.size:
        raise AbsentError(f"{title} holds no finite value")
    low, high = float(everything.min()), float(np.quantile(everything, highest))
    high = max(high, 1.05 * guide[0]) if guide else high
    high = high if high > low else low + 1
    middle = min(float(np.median(values)) for _, _, values in sorts if values.size)
    log = low > 0 and high > WIDEST * middle
    edges = np.geomspace(low, high, NUM_BINS + 1) if log else np.linspace(low, high, NUM_BINS + 1)
    edges[0], edges[-1] = low, high  # not rounded
    counted = []
    for label, colour, values in sorts:
        if values.size:
            shares = np.histogram(np.minimum(values, high), edges)[0] / values.size
            counted.append((label, colour, shares, values))
    x_axis = Axis(edges, X_PIXELS, log=log)
    y_axis = Axis(np.concatenate([[0.0], *(shares for _, _, shares, _ in counted)]), Y_PIXELS)
    base = float(y_axis.place(0.0))
    groups = []
    for label, colour, shares, _ in counted:
        path = f"M{x_axis.place(low)} {base}"
        for share, left, right in zip(shares.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            path += f"L{x_axis.place(left)} {y_axis.place(share)}H{x_axis.place(right)}"
        groups.append(Group(label, colour, f"{path}V{base}Z"))
    told = "; ".join(f"{label} {number(float(np.median(values)))} in the middle" for label, _, _, values in counted)
    beyond = int((everything > high).sum())
    remarks = [f"{beyond} beyond {number(high)} stand in the last bar"] * bool(beyond) + ["logarithmic"] * log
    return Shapes(
        title,
        f"{title}: {told}" + (f"; {guide[1]} {number(guide[0])}" if guide else ""),
        groups,
        x_label,
        x_axis.ticks,
        "share",
        y_axis.ticks,
        guide=f"M{x_axis.place(guide[0])} {Y_PIXELS[0]}V{Y_PIXELS[1]}" if guide else "",
        guide_label=f"{guide[1]} {number(guide[0])}" if guide else "",
        bars=True,
        remark=", ".join(remarks),
    )
