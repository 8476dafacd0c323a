"""Explaining: what of a row a trained model goes by: parts of images that are hidden, features that are shuffled.

Shapes: B rows, C classes, F features; H x W pixels of an image, U x V places of the patch that hides some of them.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from nn_models.batch import Batch
from nn_models.columns import Column, Features, Image
from nn_models.objectives import INSPECTED_ROWS, at_least_float32
from nn_models.signature import Signature

Model = Callable[[Tensor], Tensor]
Score = Callable[[Tensor], Tensor]

MOST_PLACES = 8  # of the patch, along a side
SHARE = 4  # the patch is a quarter as high and as wide as the image
ROWS_AT_ONCE = 256
EXPLAINED_IMAGES = 16
MOST_PIXELS = 20_000_000  # that a model is given to explain some images: seconds of a small net, on one core
REPEATS = 5  # scikit-learn's
EXPLAINED_ROWS = 1000
FEWEST_ROWS = 50  # of fewer, what is lost says little
MOST_SHUFFLED = 2_000_000  # rows that a model is given to explain a table


def places(size: int) -> tuple[int, list[int]]:
    """Along a side of so many pixels: those that the patch hides, and where it begins, at even distances."""
    patch = max(1, round(size / SHARE))
    num = min(MOST_PLACES, size - patch + 1)
    return patch, [round(place * (size - patch) / max(1, num - 1)) for place in range(num)]


@torch.no_grad()
def occlusion(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, channels, H, W), as the model reads them -> their predicted classes (B,), and (B, U, V) float32.

        map_uv = p(c | image) - p(c | image with the patch at (u, v) hidden)        c = argmax p(. | image)

    (Zeiler & Fergus 2014, section 4.2): how much surer of its prediction a model is for seeing what is there, below 0
    where it would be surer without. The patch has the image's own mean in each channel.
    """
    (height, tops), (width, lefts) = (places(size) for size in images.shape[2:])
    chances = _chances(model, images)
    predicted = chances.argmax(1)
    sure = chances.gather(1, predicted[:, None])[:, 0]
    mean = images.mean((2, 3), keepdim=True)
    maps = torch.empty(len(images), len(tops), len(lefts), device=images.device)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            hidden = images.clone()
            hidden[:, :, top : top + height, left : left + width] = mean
            without = _chances(model, hidden).gather(1, predicted[:, None])[:, 0]
            maps[:, row, column] = sure - without
    return predicted, maps


def spread(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps of places (B, U, V) -> of pixels (B, H, W): the mean of all places whose patch hides the pixel."""
    (height, tops), (width, lefts) = (places(one) for one in size)
    total, count = maps.new_zeros(len(maps), *size), maps.new_zeros(size)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            area = (slice(top, top + height), slice(left, left + width))
            total[(slice(None), *area)] += maps[:, row, column, None, None]
            count[area] += 1
    return total / count.clamp(min=1)


def explainable_images(shape: tuple[int, ...]) -> int:
    """How many images (channels, H, W) are explained in a test's time: fewer large ones."""
    channels, height, width = shape
    num_places = (1 + len(places(height)[1]) * len(places(width)[1])) * channels * height * width
    return min(EXPLAINED_IMAGES, MOST_PIXELS // num_places)


@torch.no_grad()
def permutation_importance(
    model: Model,
    rows: Tensor,
    score: Score,
    *,
    shuffled: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows (B, F) -> the score of the model's outputs, and what is lost of it: (F, repeats) float64.

    Of a feature and a repeat it is the score less that of the same rows with that feature taken from the rows
    `shuffled` (repeats, B) says (Breiman 2001, section 10; as scikit-learn's permutation_importance).
    """
    base = score(_outputs(model, rows)).double().cpu()
    lost = torch.empty(rows.shape[1], len(shuffled), dtype=torch.float64)
    for feature in range(rows.shape[1]):
        for repeat, order in enumerate(shuffled):
            other = rows.clone()
            other[:, feature] = rows[order, feature]
            lost[feature, repeat] = base - score(_outputs(model, other)).double().cpu()
    return base, lost


def explainable_rows(num_features: int) -> int:
    """How many rows of a table are explained in a test's time; 0 of one of very many features."""
    rows = min(EXPLAINED_ROWS, MOST_SHUFFLED // (REPEATS * num_features))
    return rows if rows >= FEWEST_ROWS else 0


def rows_explained(column: Column) -> int:
    """How many of the first rows of a test `explained` looks at, at most."""
    if isinstance(column, Image):
        return max(1, explainable_images(column.shape))
    return max(1, explainable_rows(column.size)) if isinstance(column, Features) else INSPECTED_ROWS


def explained(model: Model, signature: Signature, batch: Batch, *, score: Score, classes: bool) -> dict[str, Tensor]:
    """What the sections `occlusion` and `importance` of the report are made of, of these rows, on the CPU.

    occlusion/images, maps, predictions, targets   (B, channels, H, W) as stored, (B, H, W) float16, (B,), (B,)
    importance/score, lost, rows                   (), (F, REPEATS) float64: see permutation_importance; ()
    """
    column = signature["input"]
    if isinstance(column, Image) and classes and explainable_images(column.shape):
        predicted, maps = occlusion(model, batch["input"])
        found = {"images": cast(Tensor, batch.stored["input"]), "maps": spread(maps, column.shape[1:]).half()}
        found |= {"predictions": predicted, "targets": batch["target"]}
        return {f"occlusion/{name}": values.cpu().contiguous() for name, values in found.items()}
    if isinstance(column, Features) and explainable_rows(column.size):
        rows = batch["input"]
        generator = torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(len(rows), generator=generator) for _ in range(REPEATS)])
        base, lost = permutation_importance(model, rows, score, shuffled=orders.to(rows.device))
        return {"importance/score": base, "importance/lost": lost, "importance/rows": torch.tensor(len(rows))}
    return {}


def _chances(model: Model, images: Tensor) -> Tensor:
    return at_least_float32(_outputs(model, images)).softmax(1)


def _outputs(model: Model, rows: Tensor) -> Tensor:
    return torch.cat([model(piece) for piece in rows.split(ROWS_AT_ONCE)])
