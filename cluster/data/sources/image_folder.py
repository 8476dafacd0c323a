"""image_folder: the user's own tree of class/image.png, local or at a URI."""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from cluster.data.layouts import Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import (
    BadRows,
    DataSpec,
    DrawnTestSpec,
    FileColumns,
    Part,
    Pixels,
    absolute,
    bad_rows,
    each,
    labels,
    pixels,
)
from cluster.data.sources.image_tree import image_tree
from cluster.data.sources.pixels import decode_image
from cluster.data.split import Traits
from cluster.storage import Folder
from nn_models.columns import Column, Label
from nn_models.errors import Problem, UserError
from nn_models.spec import invalid

PART_ROWS = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """Parts are runs of (path below the root, label) in a fixed random order, so that no shard holds one class."""

    root: str
    columns: dict[str, StoredColumn]
    pools: dict[str, list[Part]]
    resize: bool
    group: str | None = None  # see ImageFolderSpec

    def load(self, part: Part) -> dict[str, Layout]:
        """See Source."""
        channels, *size = self.columns["input"].column.row_shape
        field = None if self.resize else "data.image_size"
        folder = Folder(self.root)

        def read(row: tuple[str, int]) -> NDArray[np.uint8]:
            return _image(folder, row[0], channels=channels, size=tuple(size), size_field=field)

        images = each(read, part.what)
        targets = np.array([label for _, label in part.what], np.int64)
        return {"input": Dense(np.stack(images)), "target": Dense(targets)}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        labels = np.array([label for _, label in part.what], np.int64)
        if self.group is None:
            return Traits(labels)
        found = [re.search(self.group, name.rpartition("/")[2]) for name, _ in part.what]
        for (name, _), match in zip(part.what, found, strict=True):
            if match is None:
                raise UserError(
                    "data.group",
                    f"{self.group!r} is not found in the name of {self.root}/{name}",
                    "give a regular expression that finds whom an image belongs to in the names of all files",
                )
        texts = [match[1 if match.lastindex else 0] for match in found if match]
        return Traits(labels, np.array(texts, np.object_))


class ImageFolderSpec(DrawnTestSpec):
    """A folder of images: ROOT/class/image.png, or ROOT/train/class/… beside ROOT/validation/… and ROOT/test/….

    Without class folders all images are of one class, named "all".
    """

    kind: Literal["image_folder"] = "image_folder"
    path: str = Field(min_length=1, description="the folder, local or a URI")
    image_size: tuple[Pixels, Pixels] | None = Field(
        None, description="height and width that images are resized to; needed where they differ in size"
    )
    channels: Literal[1, 3] = Field(3, description="3 for colour, 1 for grey")
    group: str | None = Field(
        None,
        min_length=1,
        description="a regular expression; files in whose names it (or its first group) finds the same stay together",
    )

    @field_validator("group")
    @classmethod
    def _is_an_expression(cls, group: str | None) -> str | None:
        try:
            re.compile(group or "")
        except re.error as error:
            raise invalid(f"not a regular expression ({error})", "give one such as '^p[0-9]+'") from None
        return group

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={"path": absolute(self.path, base)})

    def fingerprint(self) -> str:
        """See DataSpec."""
        found = [
            (name, info.size, info.mtime_ns)
            for classes in image_tree(self.path).pools.values()
            for images in classes.values()
            for name, info in images
        ]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    @property
    def file_columns(self) -> FileColumns:
        """See DataSpec: names of columns that are usual where a file has images."""
        return FileColumns(("image",), "label", resize=self.image_size is not None)

    def target_fix(self, kinds: tuple[type[Column], ...]) -> tuple[str, str] | None:
        """See DataSpec."""
        if Label not in kinds or len(image_tree(self.path).pools["train"]) > 1:
            return None
        examples = f"{self.path}/cat/1.png, {self.path}/dog/2.png"
        return "data.path", f"put the images of each class into a folder of its own ({examples})"

    def open(self) -> ImageFolder:
        """See DataSpec. Refuses class folders without images, and says what of the folder is not used."""
        tree = image_tree(self.path)
        if tree.unused:
            logger.warning("%s: not used: %s", self.path, "; ".join(tree.unused))
        names = sorted(tree.pools["train"])
        for pool in tree.pools:
            for name in tree.pools[pool]:
                if name not in names:
                    where = os.path.dirname(tree.pools[pool][name][0][0])
                    raise UserError(f"{self.path}/{where}", "a class without training images", "add some or remove it")
        folder = Folder(self.path)
        label = {name: index for index, name in enumerate(names)}
        pools: dict[str, list[Part]] = {}
        for pool, classes in tree.pools.items():
            labelled = [(image, label[name]) for name, images in classes.items() for image, _ in images]
            shuffled = [labelled[i] for i in np.random.default_rng(self.split_seed).permutation(len(labelled))]
            runs = [shuffled[first : first + PART_ROWS] for first in range(0, len(shuffled), PART_ROWS)]
            pools[pool] = [Part(len(run), tuple(run)) for run in runs]
        first = [image for name in names for image, _ in tree.pools["train"][name]]
        columns = {"input": pixels(self._shape(folder, first)), "target": labels(tuple(names))}
        return ImageFolder(self.path, columns, pools, resize=self.image_size is not None, group=self.group)

    def _shape(self, folder: Folder, images: Sequence[str]) -> tuple[int, ...]:
        """Of the first image that can be read; what is wrong with the others is told when all are."""
        problems: list[Problem] = []
        for name in images:
            try:
                return _image(folder, name, channels=self.channels, size=self.image_size, size_field=None).shape
            except BadRows as error:
                problems += error.problems
        raise bad_rows(problems)


def _image(
    folder: Folder, name: str, *, channels: int, size: tuple[int, ...] | None, size_field: str | None
) -> NDArray[np.uint8]:
    where = f"{folder}/{name}"
    try:
        content = folder.read_bytes(name)
    except OSError as error:
        raise UserError(where, f"cannot be read ({error})", "check the file") from None
    return decode_image(content, name=where, channels=channels, size=size, size_field=size_field)  # type: ignore[arg-type]
