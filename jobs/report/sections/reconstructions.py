"""Reconstructions: rows beside what became of them; how far off all are, the threshold, and what lies far above it."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jobs.report.charts import number
from jobs.report.confusion import class_namer
from jobs.report.files import Tensors, is_number, left_out, mapping
from jobs.report.pictures import Array, example_shape, pictures
from jobs.report.sections.numbers import compared
from jobs.report.sections.section import EVALUATION, Run, Section
from jobs.report.shapes import Shapes, colour_of, histogram
from nn_models.anomaly import AVERAGE_PRECISION, NORMAL_ERROR, novel
from nn_models.signature import Signature
from nn_models.spec import validate

MAX_ROWS = 12  # of the first, and of those of the largest errors
SERIES = {"inputs": "the row", "given": "as the net was given it", "again": "again"}
WHO = {"the model": "", "PCA of as many components": "pca_", "the noisy row itself": "identity_"}
ERRORS = ("mse",)
AREAS = {"auroc": "AUROC", AVERAGE_PRECISION.name: AVERAGE_PRECISION.words}


class Strip(NamedTuple):
    """A line of pictures, one a row of the split."""

    label: str
    pictures: list[str]


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors, metrics = run.evaluation, mapping(run.result.get("metrics"))
    found: dict[str, Any] = {
        "split": tensors.metadata.get("split", "test"),
        "compared": compared(metrics, WHO, ERRORS),
        "first": [],
        "worst": [],
        "worst_told": [],
        "histogram": None,
        "found": [],
        "areas": [],
    }
    with left_out(run.notes, "The reconstructions", file=tensors.name):
        errors = tensors["errors"]
        found |= {"rows": len(errors), "noisy": "example_given" in tensors}
        anomalous = _anomalous(tensors)
        limit = metrics.get(f"validation/{NORMAL_ERROR.name}")
        found["histogram"] = _histogram(errors, anomalous, float(limit) if is_number(limit) else None)
        if anomalous is not None:
            found["areas"] = [(name, values) for name, values in compared(metrics, WHO, tuple(AREAS))]
            if is_number(limit):
                found["found"] = _found(errors > limit, anomalous)
        if example_shape(tensors):
            found |= _examples(tensors)
        return found
    return {}


def _anomalous(tensors: Tensors) -> Array | None:
    """Whether each row is of a class that training had no row of; None where there is none."""
    signature: Signature = validate(Signature, json.loads(tensors.metadata.get("signature", "{}")), prefix="signature")
    classes = novel(signature)
    return np.isin(tensors["labels"], classes) if classes and "labels" in tensors else None


def _histogram(errors: Array, anomalous: Array | None, limit: float | None) -> Shapes:
    sorts = [("all rows", colour_of(0), errors)]
    if anomalous is not None:
        sorts = [("normal rows", colour_of(0), errors[~anomalous]), ("anomalies", colour_of(2), errors[anomalous])]
    guide = None if limit is None else (limit, "threshold")
    return histogram("Errors of rows", sorts, x_label="squared error a number", guide=guide)


def _found(above: Array, anomalous: Array) -> list[tuple[str, str]]:
    """What the run's own threshold finds: in words, and the figure."""
    hits, alarms = int((above & anomalous).sum()), int((above & ~anomalous).sum())
    normal = int((~anomalous).sum())
    shares = {
        "precision": (hits, hits + alarms),
        "recall": (hits, int(anomalous.sum())),
        "of normal rows above it": (alarms, normal),
    }
    return [
        (name, f"{100 * part / whole:.1f}\u202f% ({part} of {whole})")
        for name, (part, whole) in shares.items()
        if whole
    ]


def _examples(tensors: Tensors) -> dict[str, Any]:
    """Lines of pictures: the first rows of the split, and those of the largest errors."""
    rows, errors = tensors["example_rows"], tensors["example_errors"]
    half = len(rows) // 2  # both sorts have as many
    first = np.argsort(rows[:half], kind="stable")[:MAX_ROWS]
    worst = half + np.argsort(-errors[half:], kind="stable")[:MAX_ROWS]
    kept = {name: tensors[f"example_{name}"] for name in SERIES if f"example_{name}" in tensors}
    labels = tensors["labels"] if "labels" in tensors else np.empty(0)
    name_of = class_namer(tensors)
    told = []
    for place in worst.tolist():
        label = "" if not len(labels) else f"{name_of(int(labels[rows[place]]))}, "
        told.append(f"{label}{number(float(errors[place]))}")
    return {"first": _strips(kept, first), "worst": _strips(kept, worst), "worst_told": told}


def _strips(kept: dict[str, Array], where: Sequence[int] | Array) -> list[Strip]:
    return [Strip(SERIES[name], pictures(values[where])) for name, values in kept.items()]


SECTION = Section(
    name="reconstructions",
    template="reconstructions.html",
    read=_read,
    title="The reconstructions",
    file=EVALUATION,
    figures=("auroc", "average_precision", "negative_elbo", "negative_bound", "mse", "pca_mse", "pca_auroc", "loss"),
)
