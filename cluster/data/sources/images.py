"""Named image sets: digits (always there), fashion_mnist, mnist, cifar10."""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from cluster.data.cache import cache_root
from cluster.data.layouts import Array, Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import (
    DrawnTestSpec,
    Fraction,
    Part,
    Pixels,
    SplitSpec,
    absolute,
    even_parts,
    labels,
    pixels,
)
from cluster.data.sources.pixels import resize
from cluster.data.split import Traits
from nn_models.errors import UserError

PART_ROWS = 20_000
DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Debian's package dataset-fashion-mnist
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
# md5 of the uncompressed files: Debian compressed them anew, so the archives' own sums differ from torchvision's
FASHION_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


@dataclass(frozen=True)
class ImageSet:
    """A set whose splits are loaded whole: `reader` and `where` name what `_read` loads."""

    reader: str
    where: str
    columns: dict[str, StoredColumn]
    pools: dict[str, list[Part]]

    def load(self, part: Part) -> dict[str, Layout]:
        """See Source."""
        pool, first, end = part.what
        images, targets = _read(self.reader, self.where, pool)
        _, height, width = self.columns["input"].column.row_shape
        return {"input": Dense(resize(images[first:end], (height, width))), "target": Dense(targets[first:end])}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        pool, first, end = part.what
        return Traits(labels=_read(self.reader, self.where, pool)[1][first:end])


def _image_set(
    reader: str, where: str, names: tuple[str, ...], pools: tuple[str, ...], size: tuple[int, int] | None
) -> ImageSet:
    loaded = {pool: _read(reader, where, pool) for pool in pools}
    parts = {
        pool: [Part(part.rows, (pool, *part.what)) for part in even_parts(len(targets), PART_ROWS)]
        for pool, (_, targets) in loaded.items()
    }
    channels, *own_size = loaded["train"][0].shape[1:]
    columns = {"input": pixels((channels, *(size or own_size))), "target": labels(names)}
    return ImageSet(reader, where, columns, parts)


@lru_cache(maxsize=2)
def _read(reader: str, where: str, pool: str) -> tuple[Array, Array]:
    """Images (rows, channels, height, width) uint8 and labels (rows,) int64."""
    if reader == "digits":
        return _digits()
    if reader == "idx":
        prefix = "train" if pool == "train" else "t10k"
        images = _idx(Path(where), f"{prefix}-images-idx3-ubyte").reshape(-1, 1, 28, 28)
        return images, _idx(Path(where), f"{prefix}-labels-idx1-ubyte").astype(np.int64)
    return _torchvision(reader, where, pool)


def _digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # sixteen levels of ink
    return grey[:, None], bunch.target.astype(np.int64)


def _idx(folder: Path, name: str) -> Array:
    """The bytes after the header of an IDX file (LeCun's MNIST format), checked against the known md5."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.exists() else packed
    try:
        content = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(str(path), "missing", "put all four files of Fashion-MNIST there") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(str(path), f"cannot be read ({error})", "fetch it again") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != FASHION_MD5[name]:
        raise UserError(str(path), "not the published Fashion-MNIST file (its md5 differs)", "fetch it again")
    dimensions = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)


def _torchvision(name: str, where: str, pool: str) -> tuple[Array, Array]:
    # torchvision compares the md5 of what it downloads, and CIFAR-10's each time before it unpickles them; MNIST's
    # unpacked files, which hold no pickles, it takes as they are
    from torchvision import datasets

    try:
        loaded = getattr(datasets, name)(where, train=pool == "train", download=True)
    except Exception as error:  # torchvision raises whatever its mirrors and archives do
        reason = " ".join(str(error).split())
        raise UserError(
            "data.root",
            f"{name} is neither in {where} nor could it be downloaded ({reason})",
            "put the files there or give another data.root",
            names=("data.root",),
        ) from None
    images = np.asarray(loaded.data)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.asarray(loaded.targets, np.int64)


ImageSize = Annotated[tuple[Pixels, Pixels] | None, Field(description="height and width that images are resized to")]


class DigitsSpec(DrawnTestSpec):
    """1797 real handwritten digits of 8x8 pixels, bundled with scikit-learn: always there."""

    kind: Literal["digits"] = "digits"
    image_size: ImageSize = None
    test_fraction: Fraction = Field(0.2, description="share held out for test")

    def open(self) -> ImageSet:
        """See DataSpec."""
        return _image_set("digits", "", DIGIT_NAMES, ("train",), self.image_size)


class _DownloadedSpec(SplitSpec):
    image_size: ImageSize = None
    root: str | None = Field(None, description="folder with the files; downloaded into the cache where it is not given")

    def resolved(self, base: str) -> SplitSpec:
        """See DataSpec."""
        return self.model_copy(update={"root": absolute(self.root, base)}) if self.root else self

    @property
    def _place(self) -> str:
        """Where torchvision looks, and downloads to. Raises UserError for a root that is not there."""
        if self.root and not Path(self.root).is_dir():
            raise UserError("data.root", f"{self.root}: no such folder", f"give the one with the files of {self.kind}")
        return self.root or str(cache_root() / "downloads")


class FashionMNISTSpec(_DownloadedSpec):
    """70,000 pieces of clothing of 28x28 pixels (Xiao, Rasul & Vollgraf 2017)."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"

    def open(self) -> ImageSet:
        """From `root`, else Debian's package dataset-fashion-mnist, else torchvision's download."""
        place = self._place
        for folder in [Path(self.root)] if self.root else [DEBIAN_FASHION]:
            for inside in (folder, folder / "FashionMNIST" / "raw"):  # torchvision's layout too
                if any((inside / f"train-labels-idx1-ubyte{ending}").exists() for ending in ("", ".gz")):
                    return _image_set("idx", str(inside), FASHION_NAMES, ("train", "test"), self.image_size)
        return _image_set("FashionMNIST", place, FASHION_NAMES, ("train", "test"), self.image_size)


class MNISTSpec(_DownloadedSpec):
    """70,000 handwritten digits of 28x28 pixels (LeCun et al. 1998)."""

    kind: Literal["mnist"] = "mnist"

    def open(self) -> ImageSet:
        """See DataSpec."""
        return _image_set("MNIST", self._place, DIGIT_NAMES, ("train", "test"), self.image_size)


class CIFAR10Spec(_DownloadedSpec):
    """60,000 colour photographs of 32x32 pixels in ten classes (Krizhevsky 2009)."""

    kind: Literal["cifar10"] = "cifar10"

    def open(self) -> ImageSet:
        """See DataSpec."""
        return _image_set("CIFAR10", self._place, CIFAR_NAMES, ("train", "test"), self.image_size)
