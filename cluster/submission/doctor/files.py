"""Files: whether a node can write where runs go, sees what the others write there, and reads the data."""

import hashlib
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.data.shards import DataSet
from cluster.errors import StorageFailed
from cluster.storage import Folder
from cluster.submission.doctor.machine import Disk
from nn_models.errors import UserError

PROBE = ".manta-doctor-"  # hidden: a run may begin in a folder that only has such
BLOCK_BYTES = 1 << 20
APPEARS_S = 10.0  # NFS keeps what it knows of a folder for 3 to 60 s, but looks again where a file is asked for by name
POLL_S = 0.2


@dataclass(frozen=True)
class Written:
    """How writing a file went: what was wrong, or how many bytes a second."""

    problem: str | None = None
    fix: str | None = None
    bytes_per_s: float = 0.0
    free_bytes: int | None = None  # of the disk; what a quota leaves nobody says
    made: tuple[str, ...] = ()  # folders that were not there before


def write_probe(where: str, key: str, name: str, num_bytes: int) -> Written:
    """Write a file of so many bytes and one with this node's name, both in `where`, as a run would.

    A disk that is full, or a quota, shows itself only where something is written.
    """
    made: tuple[str, ...] = ()
    try:
        folder = Folder(where)
        local = folder.local
        if local is not None:
            made = tuple(str(place) for place in (local, *local.parents) if not place.exists())
        probe = folder.create() / f"{PROBE}{key}"
        probe.create()
        began = time.perf_counter()
        content = os.urandom(BLOCK_BYTES) * max(1, num_bytes // BLOCK_BYTES)
        large = f"{name}.large"
        try:
            probe.write_bytes(large, memoryview(content))
            if local is not None:
                _sync(Path(probe.full(large)))
            took = time.perf_counter() - began
        finally:
            with suppress(UserError, StorageFailed):
                probe.delete(large)
        probe.write_text(name, key)
    except (UserError, StorageFailed) as error:
        return Written(*_told(error), made=made)
    free = Disk.of(local) if local is not None else None
    return Written(bytes_per_s=len(content) / took, free_bytes=free.free if free else None, made=made)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def unseen(where: str, key: str, names: Sequence[str], *, patience_s: float = APPEARS_S) -> list[str]:
    """Those of the nodes' files that cannot be read here, once they have had time to appear."""
    missing = [*names]
    until = time.monotonic() + patience_s
    while True:
        missing = [name for name in missing if not _reads(where, key, name)]
        if not missing or time.monotonic() > until:
            return missing
        time.sleep(POLL_S)


def _reads(where: str, key: str, name: str) -> bool:
    try:
        return (Folder(where) / f"{PROBE}{key}").read_text(name) == key
    except (OSError, UserError, StorageFailed):
        return False


def clear_probe(where: str, key: str, name: str | None = None) -> None:
    """Remove this node's file, or the whole probe; what cannot be removed stays."""
    with suppress(OSError, UserError, StorageFailed):
        (Folder(where) / f"{PROBE}{key}").delete(name or "")


def remove_empty(folders: Sequence[str]) -> None:
    """Remove those folders, from the innermost on, that hold nothing: they were made to write into."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


def new_key() -> str:
    """Of one examination: several may go on at once."""
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True)
class DataRead:
    """How reading prepared data went, or a recipe's files."""

    problem: str | None = None
    fix: str | None = None
    bytes_per_s: float | None = None


@dataclass(frozen=True)
class Wanted:
    """What every node must be able to read: a prepared data set whose rows are streamed, and files of the model."""

    data: str | None = None
    files: tuple[str, ...] = field(default=())


def read_wanted(wanted: Wanted) -> DataRead:
    """See that all shards are there with the size they should have, and read the first of the training rows whole."""
    rate = None
    try:
        for file in wanted.files:
            with open(file, "rb") as opened:
                opened.read(1)
        if wanted.data is not None:
            data = DataSet(wanted.data)
            shard = data.manifest.splits["train"][0]
            began = time.perf_counter()
            content = data.folder.read_buffer(shard.file)
            rate = shard.bytes / (time.perf_counter() - began)
            if hashlib.sha256(content).hexdigest() != shard.sha256:
                return DataRead(f"{data.folder}/{shard.file}: its checksum is not the manifest's", data.fix)
    except (UserError, StorageFailed) as error:
        return DataRead(*_told(error))
    except OSError as error:
        return DataRead(f"{error.filename}: {error.strerror}", "put it there, or on storage that all nodes reach")
    return DataRead(bytes_per_s=rate)


def _told(error: Exception) -> tuple[str, str | None]:
    """What is wrong and what to do. StorageFailed has both in one text, parted by its last semicolon."""
    if isinstance(error, UserError):
        return f"{error.path}: {error.message}", error.fix
    message, _, fix = str(error).rpartition("; ")
    return (message, fix) if message else (fix, None)
