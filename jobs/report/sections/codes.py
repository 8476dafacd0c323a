"""Codes: where rows lie in two dimensions, how their units are used, and what moving along one of them does."""

from typing import Any, NamedTuple

import numpy as np

from jobs.report.charts import number
from jobs.report.confusion import class_namer
from jobs.report.files import Tensors, left_out
from jobs.report.pictures import Array, pictures
from jobs.report.sections.section import EVALUATION, Run, Section
from jobs.report.shapes import Shapes, colour_of, dots, histogram
from nn_models.sparse import ACTIVE

MAX_DOTS = 4000  # rows that are drawn


class Traversal(NamedTuple):
    """Rows of codes in which one number moves, and what the others are like."""

    label: str
    pictures: list[str]


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    with left_out(run.notes, "The codes", file=tensors.name):
        codes = tensors["codes"].astype(np.float64)
        used = (np.abs(codes) > ACTIVE).mean(0)
        dead = int((used == 0).sum())
        return {
            "split": tensors.metadata.get("split", "test"),
            "rows": len(codes),
            "units": codes.shape[1],
            "dead": dead,
            "dead_share": f"{100 * dead / codes.shape[1]:.0f}\u202f%",
            "active": f"{100 * used.mean():.1f}\u202f%",
            "limit": number(ACTIVE),
            "plane": _plane(tensors, codes),
            "activations": histogram(
                "Activations", [("all units of all rows", colour_of(0), codes.ravel())], x_label="value"
            ),
            "usage": histogram(
                "How often units are active",
                [("units", colour_of(4), used)],
                x_label=f"share of rows, |h| > {ACTIVE}",
                highest=1.0,
            ),
            "traversals": _traversals(tensors),
        }
    return {}


def _plane(tensors: Tensors, codes: Array) -> Shapes:
    """The first rows' codes, by their first two principal components where there are more than two numbers."""
    labels = tensors["labels"][:MAX_DOTS] if "labels" in tensors else None
    names: list[str] = []
    if labels is not None:
        name_of = class_namer(tensors)
        names = [name_of(place) for place in range(int(labels.max(initial=0)) + 1)]
    if codes.shape[1] == 1:
        errors = tensors["errors"].astype(np.float64)[:MAX_DOTS]
        return dots("Codes and errors", codes[:MAX_DOTS, 0], errors, labels, names, axes=("code", "error"))
    if codes.shape[1] == 2:
        first, second = codes[:MAX_DOTS].T
        return dots("Codes", first, second, labels, names, axes=("first number", "second number"))
    centred = codes - codes.mean(0)
    variances, vectors = np.linalg.eigh(np.nan_to_num(centred.T @ centred))
    shares = variances[::-1] / max(float(variances.sum()), 1e-30)
    first, second = (centred[:MAX_DOTS] @ vectors[:, ::-1][:, :2]).T
    axes = [f"component {place + 1}: {100 * shares[place]:.0f} % of the variance" for place in range(2)]
    return dots("Codes in two dimensions", first, second, labels, names, axes=axes)


def _traversals(tensors: Tensors) -> list[Traversal]:
    """One line of pictures for each number of the code that was moved."""
    if "codes/traversals" not in tensors:
        return []
    rows, units = tensors["codes/traversals"], tensors["codes/units"]
    return [Traversal(f"h{unit + 1}", pictures(of_unit)) for unit, of_unit in zip(units.tolist(), rows, strict=True)]


SECTION = Section(name="codes", template="codes.html", read=_read, title="The codes", file=EVALUATION)
