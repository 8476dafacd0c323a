"""Where a command is to write: a file's folder and its name in it, looked at before anything is made."""

import os
from collections.abc import Sequence

from cluster.storage import Folder
from nn_models.errors import UserError


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


def write_whole(place: tuple[Folder, str], content: bytes, *, out: str) -> str:
    """Write the file, or replace it, and return where it is. Raises UserError where that cannot be done."""
    folder, name = place
    try:
        folder.write_bytes(name, content)
    except OSError as error:
        raise UserError("--out", f"{out} cannot be written ({error})", "choose another place") from None
    return f"{folder.uri.rstrip('/')}/{name}"
