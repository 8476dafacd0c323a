"""Where a command is to write: a file's folder and its name in it, looked at before anything is made."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cluster.storage import Folder
from nn_models.errors import UserError

BLOCK_BYTES = 1 << 22  # of a file that are copied at once


def place_of(out: str, endings: Sequence[str], *, what: str) -> tuple[Folder, str]:
    """The folder and the name in it of a local path or a URI that ends in one of these.

    Raises UserError where no such file can be written there: `what` it is, `a PNG file`.
    """
    name = out.rpartition("/")[2].lower()
    if not any(name.endswith(ending) and name != ending for ending in endings):
        raise UserError("--out", f"{out!r} is not the name of {what}", f"end it in {' or '.join(endings)}")
    parent, _, name = out.rpartition("/")
    folder = Folder(parent if parent else "/" if out.startswith("/") else ".")
    local = folder.local
    if local is None:
        return folder, name
    if not local.is_dir():
        raise UserError("--out", f"{local} is not a folder", "make it first, or choose another place")
    if (local / name).is_dir():
        raise UserError("--out", f"{local / name} is a folder", "give the name of a file in it")
    if not os.access(local, os.W_OK):
        raise UserError("--out", f"no permission to write into {local}", "choose another place")
    return folder, name


def refuse_existing(place: tuple[Folder, str], *, overwrite: bool) -> None:
    """Raise UserError where there is such a file already, and it is not to be replaced."""
    folder, name = place
    if not overwrite and folder.exists(name):
        raise UserError("--out", f"{folder.uri.rstrip('/')}/{name} exists", "replace it with --overwrite")


@contextmanager
def new_folder(out: str, *, overwrite: bool, holds: Collection[str]) -> Iterator[Path]:
    """A folder to fill, which takes its place once the block has come to its end, and else is deleted.

    One that is there is replaced where that is asked for, and where it has nothing but what it `holds`, so that nobody
    loses a run, a repository or anything else. Raises UserError where it cannot be made.
    """
    if "://" in out:
        raise UserError("--out", f"{out} is no folder on this machine", "write it here, and upload it")
    place = Path(out).absolute()
    if not place.parent.is_dir():
        raise UserError("--out", f"{place.parent} is not a folder", "make it first, or choose another place")
    if not os.access(place.parent, os.W_OK):
        raise UserError("--out", f"no permission to write into {place.parent}", "choose another place")
    if place.is_file() or place.is_symlink():
        raise UserError("--out", f"{place} is a file or a link", "choose another place")
    there = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    if there and not overwrite:
        raise UserError("--out", f"{place} exists", "replace it with --overwrite")
    if other := [name for name in there if name not in holds]:
        raise UserError("--out", f"{place} holds something else ({other[0]})", "choose another place")
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
        try:
            new, old = Path(beside, "new"), Path(beside, "old")
            new.mkdir()
            yield new
            if place.is_dir():
                place.rename(old)
            try:
                new.rename(place)
            except OSError:
                if old.is_dir():
                    old.rename(place)
                raise
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise UserError("--out", f"{out} cannot be written ({error})", "choose another place") from None


def write_whole(place: tuple[Folder, str], content: bytes, *, out: str) -> str:
    """Write the file, or replace it, and return where it is. Raises UserError where that cannot be done."""
    folder, name = place
    try:
        folder.write_bytes(name, content)
    except OSError as error:
        raise UserError("--out", f"{out} cannot be written ({error})", "choose another place") from None
    return f"{folder.uri.rstrip('/')}/{name}"


@contextmanager
def new_file(place: tuple[Folder, str], *, out: str) -> Iterator[IO[Any]]:
    """A file to write piece by piece, which takes its place once the block has come to its end, and else is deleted.

    Raises UserError where it cannot be written.
    """
    folder, name = place
    # beside its place on a disk, so that it is renamed and not copied; else on this machine's
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.local) as beside:
        path = os.path.join(beside, name)
        try:
            with open(path, "wb") as file:
                yield file
            if folder.local is not None:
                os.replace(path, folder.local / name)
            else:
                with open(path, "rb") as source, folder.filesystem.open_output_stream(folder.full(name)) as target:
                    while piece := source.read(BLOCK_BYTES):
                        target.write(piece)
        except OSError as error:
            raise UserError("--out", f"{out} cannot be written ({error})", "choose another place") from None
