"""image_folder: the user's own tree of class/image.png, local or at a URI."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs
from pydantic import Field, field_validator

from cluster.data.layouts import Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import DataSpec, DrawnTestSpec, Part, Pixels, absolute, labels, pixels
from cluster.data.sources.pixels import decode_image
from cluster.data.split import Traits
from cluster.storage import Folder
from nn_models.errors import UserError
from nn_models.spec import invalid

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PART_ROWS = 1024

Tree = dict[str, dict[str, list[fs.FileInfo]]]  # pool -> class -> its images


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
        images = [_image(folder, name, channels=channels, size=tuple(size), size_field=field) for name, _ in part.what]
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
    """A folder of images: ROOT/class/image.png, or ROOT/train/class/… and ROOT/test/class/…."""

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
            (info.path, info.size, info.mtime_ns)
            for classes in self._tree().values()
            for images in classes.values()
            for info in images
        ]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def open(self) -> ImageFolder:
        """See DataSpec. Refuses class folders without images."""
        tree = self._tree()
        names = sorted(tree["train"])
        if len(names) < 2:
            raise UserError(
                "data.path",
                f"{self.path} has {len(names)} class folders",
                f"put the images of each class into a folder of its own ({self.path}/cat/1.png, {self.path}/dog/2.png)",
            )
        for name in tree.get("test", {}):
            if name not in names:
                raise UserError(f"{self.path}/test/{name}", "a class without training images", "add some or remove it")
        folder = Folder(self.path)
        below = len(folder.path) + 1
        label = {name: index for index, name in enumerate(names)}
        pools: dict[str, list[Part]] = {}
        for pool, classes in tree.items():
            labelled = [(info.path[below:], label[name]) for name, images in classes.items() for info in images]
            shuffled = [labelled[i] for i in np.random.default_rng(self.split_seed).permutation(len(labelled))]
            runs = [shuffled[first : first + PART_ROWS] for first in range(0, len(shuffled), PART_ROWS)]
            pools[pool] = [Part(len(run), tuple(run)) for run in runs]
        first = tree["train"][names[0]][0].path[below:]
        shape = _image(folder, first, channels=self.channels, size=self.image_size, size_field=None).shape
        columns = {"input": pixels(shape), "target": labels(tuple(names))}
        return ImageFolder(self.path, columns, pools, resize=self.image_size is not None, group=self.group)

    def _tree(self) -> Tree:
        """What is there now, sorted. Raises UserError where there is no folder, or one of a class without images."""
        folder = Folder(self.path)
        if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
            raise UserError("data.path", f"{self.path}: no such folder", "give the one with a folder for each class")
        entries = [(tuple(name.split("/")), info) for name, info in folder.walk()]
        folders = [names for names, info in entries if info.type == fs.FileType.Directory]
        places = {pool: (pool,) for pool in ("train", "test") if (pool,) in folders}
        tree: Tree = {}
        for pool, place in places.items() if "train" in places else [("train", ())]:
            depth = len(place)
            tree[pool] = {names[-1]: [] for names in folders if names[:-1] == place}
            for names, info in entries:
                if len(names) > depth + 1 and names[:depth] == place and _is_image(info):
                    tree[pool][names[depth]].append(info)
            for name, images in tree[pool].items():
                if not images:
                    where = "/".join([self.path, *place, name])
                    raise UserError(where, "no images in this class folder", "add some or remove it")
        return tree


def _is_image(info: fs.FileInfo) -> bool:
    return info.is_file and info.path.lower().endswith(ENDINGS)


def _image(
    folder: Folder, name: str, *, channels: int, size: tuple[int, ...] | None, size_field: str | None
) -> NDArray[np.uint8]:
    where = f"{folder}/{name}"
    try:
        content = folder.read_bytes(name)
    except OSError as error:
        raise UserError(where, f"cannot be read ({error})", "check the file") from None
    return decode_image(content, name=where, channels=channels, size=size, size_field=size_field)  # type: ignore[arg-type]
