"""Confusion: which class was taken for which, and precision and recall of each."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.report.files import Tensors
from jobs.report.pictures import BLUE, RED, data_uri

Array = NDArray[Any]

MAX_CLASSES_IN_MATRIX = 30  # more are drawn as a picture, without numbers
MAX_CLASSES_IN_TABLE = 50
MAX_CONFUSION_PIXELS = 250  # of more classes neighbours share a pixel: single ones could not be seen


def class_namer(tensors: Tensors) -> Callable[[int], str]:
    """The name of a class by its number, or the number itself."""
    names = json.loads(tensors.metadata.get("class_names", "[]"))
    return lambda index: str(names[index]) if 0 <= index < len(names) else str(index)


def confusion_page(counts: Array, class_name: Callable[[int], str], *, counted: str) -> dict[str, Any]:
    """What confusion.html shows of a matrix (C, C) int64: true classes are its rows; `counted` is what it counts."""
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"confusion has the shape {counts.shape}")
    num_classes = len(counts)
    right, num_true, num_predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    page: dict[str, Any] = {
        "num_classes": num_classes,
        "counted": counted,
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
