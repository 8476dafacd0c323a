"""Folder: one directory, local or at a URI (s3://, gs://, …), through pyarrow.fs; files appear whole or not at all."""

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

from pyarrow import ArrowInvalid, Buffer, NativeFile, fs

from cluster.errors import StorageFailed
from nn_models.errors import UserError
from nn_models.spec import validate

Content = TypeVar("Content", bytes, Buffer)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
GONE = {errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN}


class Folder:
    """A directory that may not exist yet. Names inside it are relative, with `/` between parts."""

    def __init__(self, where: str | os.PathLike[str] | Self) -> None:
        """`where` is a local path or a URI that pyarrow.fs knows. Raises UserError for one that it does not."""
        self.uri = str(where)
        if not self.uri:
            raise UserError("''", "not a place that can be read or written", "give a directory or a URI")
        if self.uri != legible(self.uri):
            raise UserError(legible(self.uri), "a name that is not UTF-8", "choose another one, or rename it")
        try:
            if "://" not in self.uri:
                self.uri = str(Path(self.uri).expanduser().absolute())
            self.filesystem, self.path = fs.FileSystem.from_uri(self.uri)
        except (ArrowInvalid, OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~unknown-user
            raise UserError(self.uri, f"not a place that can be read or written ({error})") from None
        self.path = self.path.rstrip("/") or "/"
        self._anchor: Path | None = None

    def anchored(self) -> "Folder":
        """The same directory, which is there, and which no writing makes anew where somebody deletes it."""
        folder = Folder(self.uri)
        folder._anchor = folder.local
        return folder

    @property
    def local(self) -> Path | None:
        """The path on this machine's disk; None for remote storage."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> "Folder":
        if "://" not in self.uri:
            inside = Folder(f"{self.uri.rstrip('/')}/{name}")
        else:
            place, question, options = self.uri.partition("?")  # s3://bucket/data?endpoint_override=…
            inside = Folder(f"{place.rstrip('/')}/{quote(name)}{question}{options}")
        inside._anchor = self._anchor
        return inside

    def __str__(self) -> str:
        return self.uri

    def full(self, name: str) -> str:
        """The name as this folder's filesystem knows it."""
        return f"{self.path}/{name}"

    def create(self) -> Self:
        """Make the directory. Raises UserError where it may not be written, StorageFailed where it cannot be."""
        try:
            if self.local:
                self._make(self.local)
            else:
                self.filesystem.create_dir(self.path, recursive=True)
            if self.local and not os.access(self.local, os.W_OK):
                raise PermissionError(f"no permission to write into {self.local}")
        except (OSError, ArrowInvalid) as error:
            if not self._is_users(error):
                raise failure(self.uri, "written", error) from None
            raise UserError(self.uri, f"cannot be written ({error})", "choose another directory") from None
        return self

    def _make(self, directory: Path) -> None:
        """Make a directory with those above it, but for the anchor: where that is gone it stays gone."""
        if self._anchor is None:
            directory.mkdir(parents=True, exist_ok=True)
            return
        inside = directory.relative_to(self._anchor)
        for part in [*reversed(inside.parents), inside][1:]:
            (self._anchor / part).mkdir(exist_ok=True)

    def _is_users(self, error: Exception) -> bool:
        """Whether an error is not the storage's own failure: a wrong path, or a place that may not be used."""
        if isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, ArrowInvalid)):
            return True
        return self.local is not None and getattr(error, "errno", None) not in {*FULL, *GONE, errno.EIO}

    @contextmanager
    def _reached(self, name: str, done: str) -> Iterator[None]:
        """Raise what fails in the block as UserError or StorageFailed: the file cannot be read, or written (`done`)."""
        try:
            yield
        except OSError as error:
            path = (self / name if name else self).uri
            if not self._is_users(error):
                raise failure(path, done, error) from None
            raise UserError(path, f"cannot be {done} ({error})", "check the path and permissions") from None

    @contextmanager
    def claimed(self, *, patience_s: float = 0.0) -> Iterator[None]:
        """Keep other processes that ask for it out of this directory while the block runs, or this process lives.

        Raises UserError where another has it, for so long. Object stores know no locks, nor do some shared disks.
        """
        if self.local is None:
            yield
            return
        handle = os.open(self.local, os.O_RDONLY)  # not inherited by what is started meanwhile
        try:
            with suppress(OSError):  # no locks on this disk
                if not _locked(handle, patience_s):
                    raise UserError(self.uri, "another process is at work here", "wait for it, or stop it first")
            yield
        finally:
            os.close(handle)

    def size(self, name: str) -> int | None:
        """Bytes of the file; None where there is no such file."""
        info = self.info(name)
        return info.size if info.type == fs.FileType.File else None

    def exists(self, name: str = "") -> bool:
        """Whether the file or directory is there (the folder itself without a name)."""
        return bool(self.info(name).type != fs.FileType.NotFound)

    def info(self, name: str = "") -> fs.FileInfo:
        """What is there. Raises UserError where that cannot be found out: a name too long, no permission."""
        with self._reached(name, "read"):
            return self.filesystem.get_file_info(self.full(name) if name else self.path)

    def names(self) -> list[str]:
        """Names of the files and directories directly inside, sorted; hidden ones left out.

        Raises UserError where it cannot be read.
        """
        found = self._list(fs.FileSelector(self.path, allow_not_found=True))
        names = (path.rpartition("/")[2] for path, _ in found)
        return sorted(name for name in names if not name.startswith("."))

    def walk(self) -> list[tuple[str, fs.FileInfo]]:
        """(name, what it is) of all files and directories at any depth, sorted by name; hidden ones left out.

        Raises UserError where there is no such directory or it cannot be read.
        """
        found = self._list(fs.FileSelector(self.path, recursive=True))
        below = len(self.path.rstrip("/")) + 1
        named = sorted(((path[below:], info) for path, info in found), key=lambda pair: pair[0])
        return [(name, info) for name, info in named if not any(part.startswith(".") for part in name.split("/"))]

    def check_name(self, name: str) -> None:
        """Raise UserError for a name whose bytes are not UTF-8: it can be listed, but nothing opens such a file."""
        if name != legible(name):
            raise UserError(f"{self.uri}/{legible(name)}", "a name that is not UTF-8", "rename it")

    def _list(self, selector: fs.FileSelector) -> list[tuple[str, fs.FileInfo]]:
        """(full path, what it is); see `legible` for paths that are not UTF-8."""
        try:
            return [(_path(info), info) for info in self.filesystem.get_file_info(selector)]
        except OSError as error:
            if not self.local and not self._is_users(error):
                raise failure(self.uri, "read", error) from None
            raise UserError(self.uri, f"not a folder that can be read ({error})", "check the path") from None

    def read_bytes(self, name: str) -> bytes:
        """The file's content. Raises FileNotFoundError, and UserError where it cannot be read."""
        return self._read(name, NativeFile.read)

    def read_buffer(self, name: str) -> Buffer:
        """The same in memory of Arrow's own, for Arrow to read from.

        Arrow's threads let go of what they have read a little after they have said that they are done. Of Python's
        bytes they cannot while the interpreter ends: they wait for its lock, which ends them, and so the process
        (`terminate called without an active exception`, exit status 134).
        """
        return self._read(name, NativeFile.read_buffer)

    def _read(self, name: str, read: Callable[[NativeFile], Content]) -> Content:
        try:
            with self._reached_or_missing(name), self.filesystem.open_input_file(self.full(name)) as file:
                return read(file)
        except _Missing:
            raise FileNotFoundError(self.full(name)) from None

    @contextmanager
    def _reached_or_missing(self, name: str) -> Iterator[None]:
        with self._reached(name, "read"):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError):
                raise _Missing from None

    def read_text(self, name: str) -> str:
        """The file's content as UTF-8. Raises FileNotFoundError, and UserError where it cannot be read."""
        try:
            return self.read_bytes(name).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.uri}/{name}", f"not UTF-8 text ({error})", "restore the file") from None

    def read_json(self, name: str) -> Any:
        """The file's content. Raises FileNotFoundError, and UserError where it is not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.uri}/{name}", f"not valid JSON ({error})", "restore it, or delete it") from None

    def read_as(self, name: str, kind: Any, *, fix: str = "restore it, or delete it") -> Any:
        """The JSON file's content as a `kind`, any type that pydantic knows.

        Raises FileNotFoundError, and UserError with this fix where it is no JSON or of other types.
        """
        content = self.read_bytes(name)
        try:
            return validate(kind, json.loads(content))
        except (ValueError, RecursionError) as error:
            what = f"it is not valid JSON: {error}"
        except UserError as error:
            what = f"{error.path}: {error.message}"
        raise UserError(f"{self.uri}/{name}", f"damaged ({what})", fix)

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Write the file so that a reader, or a kill, never sees half of it.

        Raises StorageFailed where that cannot be done, UserError where it may not be.
        """
        with self._reached(name, "written"):
            if self.local:
                self._write_local(self.local / name, content)
            else:  # an object store shows an object only once it is complete
                with self.filesystem.open_output_stream(self.full(name)) as stream:
                    stream.write(content)

    def _write_local(self, target: Path, content: bytes | memoryview) -> None:
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            self._make(target.parent)
            try:
                part.write_bytes(content)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise UserError(str(target), f"cannot be written ({error.strerror})", "move away what is there") from None

    def write_text(self, name: str, content: str) -> None:
        """`write_bytes` for text."""
        self.write_bytes(name, content.encode())

    def write_json(self, name: str, content: Any) -> None:
        """`write_bytes` for an object, indented."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def delete(self, name: str = "") -> None:
        """Remove a file or a directory with all it holds; nothing happens where there is none."""
        path = self.full(name) if name else self.path
        with self._reached(name, "deleted"):
            kind = self.filesystem.get_file_info(path).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(path)
            elif kind == fs.FileType.File:
                self.filesystem.delete_file(path)


def _path(info: fs.FileInfo) -> str:
    try:
        return str(info.path)
    except UnicodeDecodeError as error:  # as Python's own listings have them
        return error.object.decode("utf-8", "surrogateescape")


def legible(name: str) -> str:
    """The name as it can be printed: bytes that are not UTF-8, listed as lone surrogates, become `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Missing(Exception):
    """There is no such file."""


def failure(path: str, done: str, error: Exception) -> StorageFailed:
    """What to raise where a file can no longer be read or written (`done`)."""
    number = getattr(error, "errno", None)
    fix = "check that it can be reached"
    if number in FULL:
        fix = "make room there"
    elif number in GONE:
        fix = "put back what was deleted or unmounted, or begin anew"
    reason = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return StorageFailed(f"{path}: cannot be {done} ({reason[0] if reason else type(error).__name__}); {fix}")


def _locked(handle: int, patience_s: float) -> bool:
    """Lock an open file for this process; whether no other held it for so long. Raises OSError where there are none."""
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)
