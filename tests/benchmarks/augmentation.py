"""Augmentation: rows a second of batches of CIFAR-sized images, against torchvision's transforms row by row.

So torchvision's are applied by a DataLoader, whose rows are independent of each other. Both get uint8 images in memory.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measuring import Case, in_turn, options, publish
from pydantic import TypeAdapter
from torch import Tensor
from torchvision.transforms import v2

from cluster.data.augment import AnyAugmentSpec, Augmentation
from cluster.data.keys import row_keys

SHAPE = (3, 32, 32)
CROP_AND_FLIP: list[dict[str, Any]] = [{"kind": "random_crop", "padding": 4}, {"kind": "horizontal_flip"}]
OTHERS: list[dict[str, Any]] = [
    {"kind": kind} for kind in ("rotation", "resized_crop", "color_jitter", "erasing")
]  # as the recipe has them by default

Augment = Callable[[Tensor], Tensor]


def of_manta(sections: list[dict[str, Any]], rows: int) -> Augment:
    specs = TypeAdapter(list[AnyAugmentSpec]).validate_python(sections)
    augmentation = Augmentation(specs, shape=SHAPE)
    ids, epochs = np.arange(rows), iter(range(1_000_000_000))
    return lambda images: augmentation(images, torch.from_numpy(row_keys(0, next(epochs), ids)))


def of_torchvision(*, all_kinds: bool) -> Augment:
    transforms: list[v2.Transform] = [v2.RandomCrop(SHAPE[1:], padding=4), v2.RandomHorizontalFlip()]
    if all_kinds:
        transforms += [
            v2.RandomRotation(10.0),
            v2.RandomResizedCrop(SHAPE[1:], scale=(0.5, 1.0), antialias=True),
            v2.ColorJitter(0.2, 0.2, 0.2),
            v2.RandomErasing(0.25),
        ]
    transform = v2.Compose(transforms)
    return lambda images: torch.stack([transform(image) for image in images])


def rate(augment: Augment, images: Tensor, *, batches: int) -> float:
    """Rows a second."""
    began = perf_counter()
    for _ in range(batches):
        assert augment(images).shape == images.shape
    return batches * len(images) / (perf_counter() - began)


def main() -> None:
    chosen = options(__doc__, repetitions=7, rows=256, batches=40, threads=1)
    torch.set_num_threads(chosen.threads)
    pixels = np.random.default_rng(0).integers(0, 256, (chosen.rows, *SHAPE), dtype=np.uint8)
    images = torch.from_numpy(pixels)

    def compare(name: str, wanted: str, manta: Augment, torchvision: Augment) -> Case:
        # a batch of torchvision's takes as long as many of manta's
        pairs = in_turn(
            chosen.repetitions,
            lambda: rate(manta, images, batches=chosen.batches),
            lambda: rate(torchvision, images, batches=1),
        )
        return Case(name, wanted, "rows/s", pairs)

    cases = [
        compare("crop and flip", ">= 12", of_manta(CROP_AND_FLIP, chosen.rows), of_torchvision(all_kinds=False)),
        compare("all six kinds", ">= 8", of_manta(CROP_AND_FLIP + OTHERS, chosen.rows), of_torchvision(all_kinds=True)),
    ]
    publish("augmentation", cases, threads=chosen.threads, batch=chosen.rows, shape=SHAPE)


if __name__ == "__main__":
    main()
