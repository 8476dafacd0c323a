"""Image tree: which images a folder holds, of which split and class, and what of the folder is not used."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pyarrow import fs

from cluster.data.sources.base import UNLABELLED
from cluster.data.sources.pixels import endings
from cluster.storage import Folder, legible
from nn_models.errors import UserError

SPLIT_FOLDERS = {  # in any case
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
MOST_ENDINGS = 5  # that are named of files that are left out

Names = tuple[str, ...]  # a path below the root, by its parts
Images = list[tuple[str, fs.FileInfo]]  # (path below the root, what it is)


@dataclass(frozen=True)
class ImageTree:
    """`pools` has the images of each split and class, sorted; `unused` says in words what else is there."""

    pools: Mapping[str, Mapping[str, Images]]
    unused: tuple[str, ...]


def image_tree(path: str) -> ImageTree:
    """What is there now. Raises UserError where there is no folder, or images cannot be told apart."""
    folder = Folder(path)
    if folder.info().type != fs.FileType.Directory:
        raise UserError("data.path", f"{path}: no such folder", "give the one with a folder for each class")
    entries = [(tuple(name.split("/")), info) for name, info in folder.walk()]
    folders = [names for names, info in entries if info.type == fs.FileType.Directory]
    files = [(names, info) for names, info in entries if info.is_file]
    images = [(names, info) for names, info in files if names[-1].lower().endswith(endings())]
    places = _places(path, folders)
    pools = {pool: _classes(path, place, folders, images) for pool, place in places.items()}
    unused = [f"the folder {names[0]}" for names in folders if len(names) == 1 and not _inside(names, places.values())]
    if not pools["train"]:
        where = "/".join([path, *places["train"]])
        raise UserError("data.path", f"{where} holds no images", "give a folder that has some")
    for pool, classes in list(pools.items()):
        if not classes or list(classes) == [*UNLABELLED] != list(pools["train"]):
            why = "whose images are in no class folders" if classes else "which holds no images"
            unused.append(f"the folder {places.pop(pool)[0]}, {why}")
            del pools[pool]
    used = {name for classes in pools.values() for found in classes.values() for name, _ in found}
    for name in sorted(used):
        folder.check_name(name)
    if loose := sum(_inside(names, places.values()) and "/".join(names) not in used for names, _ in images):
        unused.append(f"{loose:,} image{'s' * (loose > 1)} in no class folder")
    unused += _other_files(names for names, _ in files if not names[-1].lower().endswith(endings()))
    return ImageTree(pools, tuple(map(legible, unused)))


def _inside(names: Names, places: Iterable[Names]) -> bool:
    return any(names[: len(place)] == place for place in places)


def _places(path: str, folders: Sequence[Names]) -> dict[str, Names]:
    """Pool -> its folder; where there are none, the root is that of the training images."""
    top = [names[0] for names in folders if len(names) == 1]
    named = {name: SPLIT_FOLDERS[name.lower()] for name in top if name.lower() in SPLIT_FOLDERS}
    train = [name for name, pool in named.items() if pool == "train"]
    nested = {names[0] for names in folders if len(names) > 1}
    if train and (len(named) == len(top) or nested & set(train)):
        places: dict[str, Names] = {}
        for name, pool in sorted(named.items(), key=lambda pair: list(SPLIT_FOLDERS.values()).index(pair[1])):
            if pool in places:
                raise UserError(
                    "data.path",
                    f"{path} has the folders {places[pool][0]} and {name} for one split",
                    "keep one of them",
                )
            places[pool] = (name,)
        return places
    if others := [name for name, pool in named.items() if pool != "train"]:
        raise UserError(
            "data.path",
            f"{path} has the folder {others[0]} of a split, but none with class folders that is called train",
            "put the folders of the training images' classes into a folder named train, or rename it if it is a class",
        )
    return {"train": ()}  # a folder named train may be one of several classes


def _classes(
    path: str, place: Names, folders: Sequence[Names], images: Iterable[tuple[Names, fs.FileInfo]]
) -> dict[str, Images]:
    """Class -> its images, of one split; where there are no class folders they are all of one class."""
    where, depth = "/".join([path, *place]), len(place)
    own = [(names, info) for names, info in images if names[:depth] == place]
    classes: dict[str, Images] = {names[-1]: [] for names in folders if names[:-1] == place}
    if not classes:
        return {UNLABELLED[0]: [("/".join(names), info) for names, info in own]} if own else {}
    for names, info in own:
        if len(names) > depth + 1:
            classes[names[depth]].append(("/".join(names), info))
    for name, found in classes.items():
        if not found:
            raise UserError(legible(f"{where}/{name}"), "no images in this class folder", "add some or remove it")
    return classes


def _other_files(files: Iterable[Names]) -> list[str]:
    counts = Counter(PurePosixPath(names[-1]).suffix.lower() or "none" for names in files)
    if not counts:
        return []
    told = ", ".join(f"{ending} {count:,}" for ending, count in counts.most_common(MOST_ENDINGS))
    more = ", …" if len(counts) > MOST_ENDINGS else ""
    total = counts.total()
    return [f"{total:,} file{'s' * (total > 1)} of endings that no image has ({told}{more})"]
