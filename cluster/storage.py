"""Folder: one directory, local or at a URI (s3://, gs://, …), through pyarrow.fs; files appear whole or not at all."""

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

from pyarrow import ArrowInvalid, Buffer, NativeFile, fs

from nn_models.errors import UserError
from nn_models.spec import validate

Content = TypeVar("Content", bytes, Buffer)


class Folder:
    """A directory that may not exist yet. Names inside it are relative, with `/` between parts."""

    def __init__(self, where: str | os.PathLike[str] | Self) -> None:
        """`where` is a local path or a URI that pyarrow.fs knows. Raises UserError for one that it does not."""
        self.uri = str(where)
        if not self.uri:
            raise UserError("''", "not a place that can be read or written", "give a directory or a URI")
        try:
            if "://" not in self.uri:
                self.uri = str(Path(self.uri).expanduser().absolute())
            self.filesystem, self.path = fs.FileSystem.from_uri(self.uri)
        except (ArrowInvalid, OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~unknown-user
            raise UserError(self.uri, f"not a place that can be read or written ({error})") from None
        self.path = self.path.rstrip("/") or "/"

    @property
    def local(self) -> Path | None:
        """The path on this machine's disk; None for remote storage."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> "Folder":
        if "://" not in self.uri:
            return Folder(f"{self.uri.rstrip('/')}/{name}")
        place, question, options = self.uri.partition("?")  # s3://bucket/data?endpoint_override=…
        return Folder(f"{place.rstrip('/')}/{quote(name)}{question}{options}")

    def __str__(self) -> str:
        return self.uri

    def full(self, name: str) -> str:
        """The name as this folder's filesystem knows it."""
        return f"{self.path}/{name}"

    def create(self) -> Self:
        """Make the directory, raising UserError where it cannot be written."""
        try:
            self.filesystem.create_dir(self.path, recursive=True)
            if self.local and not os.access(self.local, os.W_OK):
                raise PermissionError(f"no permission to write into {self.local}")
        except (OSError, ArrowInvalid) as error:
            raise UserError(self.uri, f"cannot be written ({error})", "choose another directory") from None
        return self

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes that ask for it out of this directory while the block runs, or this process lives.

        Raises UserError where another has it. Object stores know no locks, nor do some shared disks.
        """
        if self.local is None:
            yield
            return
        handle = os.open(self.local, os.O_RDONLY)  # not inherited by what is started meanwhile
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(self.uri, "another process is at work here", "wait for it, or stop it first") from None
            except OSError:  # no locks on this disk
                pass
            yield
        finally:
            os.close(handle)

    def size(self, name: str) -> int | None:
        """Bytes of the file; None where there is no such file."""
        info = self.filesystem.get_file_info(self.full(name))
        return info.size if info.type == fs.FileType.File else None

    def exists(self, name: str = "") -> bool:
        """Whether the file or directory is there (the folder itself without a name)."""
        return self.filesystem.get_file_info(self.full(name) if name else self.path).type != fs.FileType.NotFound

    def names(self) -> list[str]:
        """Names of the files and directories directly inside, sorted; hidden ones left out.

        Raises UserError where it cannot be read.
        """
        found = self._list(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if not info.base_name.startswith("."))

    def walk(self) -> list[tuple[str, fs.FileInfo]]:
        """(name, what it is) of all files and directories at any depth, sorted by name; hidden ones left out.

        Raises UserError where there is no such directory or it cannot be read.
        """
        found = self._list(fs.FileSelector(self.path, recursive=True))
        named = sorted(((info.path[len(self.path) + 1 :], info) for info in found), key=lambda pair: pair[0])
        return [(name, info) for name, info in named if not any(part.startswith(".") for part in name.split("/"))]

    def _list(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        try:
            return self.filesystem.get_file_info(selector)
        except OSError as error:
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
            with self.filesystem.open_input_file(self.full(name)) as file:
                return read(file)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(self.full(name)) from None
        except OSError as error:
            raise UserError(
                f"{self.uri}/{name}", f"cannot be read ({error})", "check the path and permissions"
            ) from None

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

        Raises UserError where a directory stands in its place, or a file in that of its directory.
        """
        if not self.local:  # an object store shows an object only once it is complete
            with self.filesystem.open_output_stream(self.full(name)) as stream:
                stream.write(content)
            return
        target = self.local / name
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
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
        kind = self.filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(path)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(path)
