"""image_folder: the user's own tree of class/image.png, local or at a URI."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pyarrow import fs
from pydantic import Field, PositiveInt

from cluster.data.sources.base import Array, Columns, DataSpec, DrawnTestSpec, Part
from cluster.data.sources.pixels import decode_image
from cluster.storage import Folder
from nn_models.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PART_ROWS = 1024


@dataclass(frozen=True)
class ImageFolder:
    """Parts are runs of (path below the root, label) in a fixed random order, so that no shard holds one class."""

    root: str
    columns: Columns
    pools: dict[str, list[Part]]

    def load(self, part: Part) -> tuple[Array, Array]:
        """See Source."""
        folder = Folder(self.root)
        channels, height, width = self.columns.input_shape
        images = [
            decode_image(folder.read_bytes(name), name=f"{self.root}/{name}", channels=channels, size=(height, width))
            for name, _ in part.what
        ]
        return np.stack(images), np.array([label for _, label in part.what], np.int64)


class ImageFolderSpec(DrawnTestSpec):
    """A folder of images: ROOT/class/image.png, or ROOT/train/class/… and ROOT/test/class/…."""

    kind: Literal["image_folder"] = "image_folder"
    path: str = Field(description="the folder, local or a URI")
    image_size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height and width that images are resized to; needed where they differ in size"
    )
    channels: Literal[1, 3] = Field(3, description="3 for colour, 1 for grey")

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self if "://" in self.path else self.model_copy(update={"path": str(Path(base, self.path).absolute())})

    @cached_property
    def _files(self) -> list[tuple[str, int]]:
        """(path below the root, bytes) of each image."""
        folder = Folder(self.path)
        if not folder.exists():
            raise UserError(f"data.path: {self.path}: no such folder; give the one with a folder for each class")
        below = len(folder.path) + 1
        infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
        files = [(info.path[below:], info.size) for info in infos if info.type == fs.FileType.File]
        return sorted((path, size) for path, size in files if path.lower().endswith(ENDINGS))

    @cached_property
    def _classes(self) -> dict[str, list[str]]:
        """Pool -> the names of its class folders."""
        folder = Folder(self.path)
        names = [name for name in folder.names() if not _is_file(folder, name)]
        pools = [name for name in names if name in ("train", "test")]
        if "train" not in pools:
            return {"": names}
        return {pool: [name for name in (folder / pool).names() if not _is_file(folder / pool, name)] for pool in pools}

    def fingerprint(self) -> str:
        """See DataSpec."""
        return hashlib.sha256(repr((self._files, self._classes)).encode()).hexdigest()

    def open(self) -> ImageFolder:
        """See DataSpec. Refuses class folders without images."""
        files = self._files
        names = sorted({name for classes in self._classes.values() for name in classes})
        if len(names) < 2:
            raise UserError(
                f"data.path: {self.path} has {len(names)} class folders; put the images of each class into a folder "
                f"of its own ({self.path}/cat/1.png, {self.path}/dog/2.png)"
            )
        pools: dict[str, list[Part]] = {}
        for pool, classes in self._classes.items():
            labelled: list[tuple[str, int]] = []
            for name in classes:
                prefix = f"{pool}/{name}/" if pool else f"{name}/"
                found = [(path, names.index(name)) for path, _ in files if path.startswith(prefix)]
                if not found:
                    raise UserError(f"{self.path}/{prefix[:-1]}: no images in this class folder; add some or remove it")
                labelled += found
            shuffled = [labelled[i] for i in np.random.default_rng(self.split_seed).permutation(len(labelled))]
            runs = [shuffled[first : first + PART_ROWS] for first in range(0, len(shuffled), PART_ROWS)]
            pools[pool or "train"] = [Part(len(run), tuple(run)) for run in runs]
        return ImageFolder(self.path, self._columns(files[0][0], names), pools)

    def _columns(self, first: str, names: list[str]) -> Columns:
        content = Folder(self.path).read_bytes(first)
        name = f"{self.path}/{first}"
        shape = decode_image(content, name=name, channels=self.channels, size=self.image_size).shape
        return Columns(shape, "uint8", "label", len(names), tuple(names))


def _is_file(folder: Folder, name: str) -> bool:
    return folder.size(name) is not None
