"""Pictures: confusion matrix, right and wrong predictions, first-layer filters."""

import base64
import io
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.report.charts import scatter_chart
from jobs.report.files import AbsentError, Tensors, left_out

Array = NDArray[Any]

MAX_CLASSES_IN_MATRIX = 30  # more are drawn as a picture, without numbers
MAX_CLASSES_IN_TABLE = 50
MAX_CONFUSION_PIXELS = 250  # of more classes neighbours share a pixel: single ones could not be seen
MAX_EXAMPLES = 24  # of the right ones, and of the wrong ones
MAX_EXAMPLE_PIXELS = 128
MAX_FILTERS = 64
MAX_OUTPUTS = 6
BLUE, RED = (47, 99, 214), (214, 69, 47)  # with transparency both read well on light and on dark


def read_evaluation(tensors: Tensors, notes: list[str]) -> dict[str, Any]:
    """What the page shows of evaluation.safetensors."""
    names = json.loads(tensors.metadata.get("class_names", "[]"))

    def class_name(index: int) -> str:
        return str(names[index]) if 0 <= index < len(names) else str(index)

    page: dict[str, Any] = {"split": str(tensors.metadata.get("split", "test"))}
    file = tensors.name
    if "confusion" in tensors:
        with left_out(notes, "The confusion matrix", file=file):
            page |= _confusion(tensors["confusion"], class_name)
    with left_out(notes, "The examples", file=file):
        if "example_predictions" not in tensors:
            raise AbsentError("the run kept none")
        targets, predictions = tensors["example_targets"], tensors["example_predictions"]
        if targets.shape != predictions.shape or not predictions.size:
            raise AbsentError(f"targets of shape {targets.shape} and predictions of shape {predictions.shape}")
        if predictions.dtype.kind == "f" and predictions.ndim <= 2:
            outputs = zip(targets.reshape(len(targets), -1).T, predictions.reshape(len(targets), -1).T, strict=True)
            page["scatter"] = [
                scatter_chart(f"output {place + 1}", *pair) for place, pair in enumerate(outputs) if place < MAX_OUTPUTS
            ]
        elif predictions.ndim == 1:
            page |= _examples(tensors, targets, predictions, class_name)
        else:
            raise AbsentError(f"predictions of shape {predictions.shape} are neither classes nor numbers")
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
    return _data_uri(pixels)


class Example(NamedTuple):
    """One row of the evaluated split: its picture, if it is one, and what the model made of it."""

    picture: str | None
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
    pictures: dict[int, str] = {}
    if example_shape(tensors):
        chosen = np.concatenate([right, wrong])
        pictures = dict(zip(chosen.tolist(), _pictures(tensors["example_inputs"][chosen]), strict=True))

    def example(row: int) -> Example:
        confidence = float(confidences[row])
        return Example(
            picture=pictures.get(row),
            true=class_name(int(targets[row])),
            predicted=class_name(int(predictions[row])),
            confidence=f"{100 * confidence:.0f}\u202f%" if math.isfinite(confidence) else None,
        )

    return {"right": [example(int(row)) for row in right], "wrong": [example(int(row)) for row in wrong]}


def example_shape(tensors: Tensors) -> tuple[int, ...] | None:
    """(channels, height, width) of the examples; None where they are no pictures."""
    shape = tensors.shapes.get("example_inputs", ())
    return shape[1:] if len(shape) == 4 and min(shape) > 0 and min(shape[2:]) > 1 else None


def _pictures(images: Array) -> list[str]:
    """Data URIs of [n, channels, height, width]: 3 channels as RGB, else the first as gray."""
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images[:, 0]
    if images.dtype != np.uint8:
        images = np.nan_to_num(images.astype(np.float32), posinf=0.0, neginf=0.0)
        low, high = min(images.min(initial=0.0), 0.0), images.max(initial=0.0)
        if low < 0 or high > 1:  # normalised rows: stretch what is there
            low, high = images.min(), images.max()
        else:
            low, high = 0.0, 1.0
        images = ((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return [_data_uri(image) for image in images]


def _data_uri(pixels: Array) -> str:
    """A picture of [height, width] or [height, width, 3 or 4] uint8, large photographs made smaller."""
    image, buffer, kind = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO(), "png"
    if image.mode != "RGBA" and max(image.size) > MAX_EXAMPLE_PIXELS // 2:
        image.thumbnail((MAX_EXAMPLE_PIXELS, MAX_EXAMPLE_PIXELS))
        kind = "jpeg"
    image.save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {"compress_level": 3}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_first_layer(tensors: Tensors, image_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """The filters that look at the picture itself: of the first convolution, or of the first dense layer."""

    def priority(name: str) -> tuple[Any, ...]:
        numbered = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
        other_channels = image_shape is not None and tensors.shapes[name][1] != image_shape[0]
        return (bool(re.search("decoder|generator", name)), other_channels, numbered)

    num_inputs = math.prod(image_shape or (0,))
    shapes = tensors.shapes
    names = [name for name, shape in shapes.items() if len(shape) == 4 and min(shape) > 0 and min(shape[2:]) > 1]
    if not names:
        names = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] == num_inputs and shape[0]]
    if not names:
        raise AbsentError("no layer of this model looks at pictures")
    name = min(names, key=priority)
    weights = np.nan_to_num(tensors[name][:MAX_FILTERS].astype(np.float32), posinf=0.0, neginf=0.0)
    if weights.ndim == 2:
        weights = weights.reshape(-1, *(image_shape or ()))
    scale = float(np.quantile(np.abs(weights), 0.995)) or 1.0  # one scale for all: a weak filter looks weak
    weights = np.clip(weights / scale, -1, 1)
    if weights.shape[1] == 3:
        pixels = (127.5 + 127.5 * weights).astype(np.uint8).transpose(0, 2, 3, 1)
    else:
        signed = weights[:, 0]
        pixels = np.empty((*signed.shape, 4), np.uint8)
        pixels[..., :3] = np.where(signed[..., None] > 0, BLUE, RED)
        pixels[..., 3] = 255 * np.abs(signed)
    return {
        "name": name,
        "shape": " x ".join(map(str, shapes[name])),
        "num_filters": shapes[name][0],
        "signed": weights.shape[1] != 3,
        "channels": weights.shape[1],
        "pictures": [_data_uri(picture) for picture in pixels],
    }
