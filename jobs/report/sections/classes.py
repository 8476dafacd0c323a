"""Classes: the confusion matrix, precision and recall of each class, and examples of right and wrong predictions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.report.confusion import class_namer, confusion_page
from jobs.report.files import AbsentError, Tensors, left_out
from jobs.report.pictures import example_shape, pictures
from jobs.report.sections.section import EVALUATION, Run, Section, predicted
from jobs.report.texts import Words, example_rows

Array = NDArray[Any]

MAX_TOKENS, MAX_CHARACTERS = 100, 400  # of a text
MAX_EXAMPLES, MAX_TEXTS = 24, 10  # of the right ones, and of the wrong ones


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    class_name = class_namer(tensors)
    page: dict[str, Any] = {
        "split": tensors.metadata.get("split", "test"),
        "num_classes": None,
        "right": [],
        "wrong": [],
    }
    if "confusion" in tensors:
        with left_out(run.notes, "The confusion matrix", file=tensors.name):
            page |= confusion_page(tensors["confusion"], class_name, counted="rows")
    with left_out(run.notes, "The examples", file=tensors.name):
        targets, predictions = predicted(tensors)
        if predictions.ndim != 1:
            raise AbsentError(f"predictions of shape {predictions.shape} are neither classes nor numbers")
        page |= _examples(tensors, targets, predictions, class_name)
    return page


class Example(NamedTuple):
    """One row of the evaluated split: its picture or its text, if it is one, and what the model made of it."""

    picture: str | None
    text: str | None
    true: str
    predicted: str
    confidence: str | None


def _examples(
    tensors: Tensors, targets: Array, predictions: Array, class_name: Callable[[int], str]
) -> dict[str, list[Example]]:
    """The right ones as they come, the wrong ones with the surest first: they teach most."""
    confidences = tensors["example_confidences"] if "example_confidences" in tensors else np.full(len(targets), np.nan)
    texts = _texts(tensors)
    most = MAX_TEXTS if texts else MAX_EXAMPLES
    right = np.flatnonzero(targets == predictions)[:most]
    wrong = np.flatnonzero(targets != predictions)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")][:most]
    shown: dict[int, str] = {}
    if example_shape(tensors):
        chosen = np.concatenate([right, wrong])
        shown = dict(zip(chosen.tolist(), pictures(tensors["example_inputs"][chosen]), strict=True))

    def example(row: int) -> Example:
        confidence = float(confidences[row])
        return Example(
            picture=shown.get(row),
            text=texts[row] if texts else None,
            true=class_name(int(targets[row])),
            predicted=class_name(int(predictions[row])),
            confidence=f"{100 * confidence:.0f}\u202f%" if math.isfinite(confidence) else None,
        )

    return {"right": [example(int(row)) for row in right], "wrong": [example(int(row)) for row in wrong]}


def _texts(tensors: Tensors) -> list[str]:
    """The examples as text, where they are texts, or trees over words; an empty list where they are not."""
    words = Words.of(tensors)
    told = ([number for number in row if number >= 0] for row in example_rows(tensors, "inputs"))  # not inner nodes
    return [_cut(words, row) for row in told]


def _cut(words: Words, row: list[int]) -> str:
    most = MAX_CHARACTERS if words.unit in ("characters", "bytes") else MAX_TOKENS
    text = words.text(row[:most])
    cut = text[:MAX_CHARACTERS].rstrip()
    return f"{cut} \u2026" if len(row) > most or len(cut) < len(text.rstrip()) else text


SECTION = Section(name="classes", template="classes.html", read=_read, title="The predictions", file=EVALUATION)
