"""Classes: the confusion matrix, precision and recall of each class, and examples of right and wrong predictions."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.report.files import AbsentError, Tensors, left_out, mapping
from jobs.report.pictures import BLUE, RED, data_uri, example_shape, pictures
from jobs.report.sections.section import EVALUATION, Run, Section, predicted

Array = NDArray[Any]

MAX_CLASSES_IN_MATRIX = 30  # more are drawn as a picture, without numbers
MAX_CLASSES_IN_TABLE = 50
MAX_CONFUSION_PIXELS = 250  # of more classes neighbours share a pixel: single ones could not be seen
MAX_WORDS = 60  # of a text
MAX_EXAMPLES = 24  # of the right ones, and of the wrong ones


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    names = json.loads(tensors.metadata.get("class_names", "[]"))

    def class_name(index: int) -> str:
        return str(names[index]) if 0 <= index < len(names) else str(index)

    page: dict[str, Any] = {
        "split": tensors.metadata.get("split", "test"),
        "num_classes": None,
        "right": [],
        "wrong": [],
    }
    if "confusion" in tensors:
        with left_out(run.notes, "The confusion matrix", file=tensors.name):
            page |= _confusion(tensors["confusion"], class_name)
    with left_out(run.notes, "The examples", file=tensors.name):
        targets, predictions = predicted(tensors)
        if predictions.ndim != 1:
            raise AbsentError(f"predictions of shape {predictions.shape} are neither classes nor numbers")
        page |= _examples(tensors, targets, predictions, class_name)
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
    return data_uri(pixels)


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
    right = np.flatnonzero(targets == predictions)[:MAX_EXAMPLES]
    wrong = np.flatnonzero(targets != predictions)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")][:MAX_EXAMPLES]
    shown: dict[int, str] = {}
    if example_shape(tensors):
        chosen = np.concatenate([right, wrong])
        shown = dict(zip(chosen.tolist(), pictures(tensors["example_inputs"][chosen]), strict=True))

    texts = _texts(tensors)

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
    """The examples' words, where they are texts, or trees over words; an empty list where they are not."""
    field = next((f for f in ("values", "words") if len(tensors.shapes.get(f"example_inputs.{f}", ())) == 1), None)
    if field is None:
        return []
    signature = json.loads(tensors.metadata.get("signature", "{}"))
    words = mapping(mapping(mapping(signature).get("columns")).get("input")).get("names") or []
    numbers = tensors[f"example_inputs.{field}"].tolist()
    ends = np.cumsum(tensors["example_inputs.lengths"])
    spans = zip(np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist(), strict=True)
    told = ([number for number in numbers[first:end] if number >= 0] for first, end in spans)  # not inner nodes
    return [" ".join(_word(words, number) for number in row[:MAX_WORDS]) for row in told]


def _word(words: Sequence[str], number: Any) -> str:
    return str(words[number]) if isinstance(number, int) and 0 <= number < len(words) else str(number)


SECTION = Section(name="classes", template="classes.html", read=_read, title="The predictions", file=EVALUATION)
