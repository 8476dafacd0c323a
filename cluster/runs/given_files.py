"""Given files: what a user names on the command line or in Python, as pieces of the rows that a model reads."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import FileColumns, Part
from cluster.data.sources.pixels import endings
from cluster.data.sources.treebank import read_lines
from cluster.data.tabular import ENDINGS, TabularFile, check_named, found_files
from cluster.runs.given_tables import INPUT, TARGET, Piece, Some, TableReader
from cluster.storage import Folder
from nn_models.columns import Image
from nn_models.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

STDIN = "-"
LINES = (".txt",)  # a row a line
PIECE_ROWS = 10_000  # of a table that are in memory at once
PART_ROWS, PART_BYTES = 50_000, 16 << 20  # of a part, which is predicted as a whole or again: whichever is less
AT_ONCE = 500  # a part has so many rows, or a multiple of it: what is computed at once does not depend on the parts
USUAL = FileColumns((INPUT,), TARGET)  # where the run's data does not say which columns of a file it is like


def part_rows(columns: Mapping[str, StoredColumn]) -> int:
    """Rows of a part."""
    row_bytes = sum(stored.row_bytes for stored in columns.values())
    return AT_ONCE * max(1, min(PART_ROWS, PART_BYTES // max(1, row_bytes)) // AT_ONCE)


class GivenFiles:
    """Rows of files that a user names, all in one order; a part can be read on its own.

    A file is an image; Parquet, CSV, TSV or JSON lines; a text with a row a line; or standard input, `-`, with a JSON
    object a line, which is read once and of which nobody knows how long it is. Of a folder all images are taken, their
    labels from the folders that they are in; or, where the model reads no images, all tables.
    """

    def __init__(
        self,
        paths: Sequence[str],
        columns: Mapping[str, StoredColumn],
        wanted: FileColumns | None,
        *,
        label: str | None = None,
        labelled: bool = True,
        sentences: bool = False,
        path: str = "DATA",
    ) -> None:
        """`columns` are those to read, as the model stores them; `path` is how errors call what was given.

        `label` names a table's column of labels, in the place of the usual one; without `labelled` none are read.
        Raises UserError for files that are not there, or that have no such rows.
        """
        if not paths:
            raise UserError(path, "no files", "name some")
        self._columns, self._path = dict(columns), path
        self._files: list[tuple[str, int, int]] = []  # for the fingerprint
        self._images: list[tuple[str, str | None]] = []  # and their labels
        tables: list[str] = []
        for name in paths:
            tables += self._found(str(name))
        if self._images and tables:
            raise UserError(path, f"images and other files ({tables[0]})", "give one kind of them")
        wanted = wanted or USUAL
        if self._images:
            own = all(text is not None for _, text in self._images) and labelled
            self._reader = TableReader(columns, replace_input(wanted, "image"), label="label" if own else None)
        else:
            self._reader = self._reader_of(tables, wanted, label, labelled, sentences)
        self._open: _Group | None = None
        self.parts = tuple(self._image_parts() if self._images else self._table_parts(tables))
        self.labelled = self._reader.label is not None
        if not self.parts:
            raise UserError(path, f"no rows in {', '.join(paths[:3])}", "give files that have some")

    @property
    def streamed(self) -> bool:
        """Whether rows come from standard input, once."""
        return self.parts[0].what[0] == STDIN

    @property
    def fingerprint(self) -> str:
        """Changes when a file does."""
        return hashlib.sha256(repr(self._files).encode()).hexdigest()

    def read(self, part: Part) -> Iterator[Piece]:
        """The part's rows. Raises UserError naming those that cannot be used."""
        kind, *what = part.what
        if kind == "images":
            yield self._read_images(*what)
        elif kind == STDIN:
            yield from self._read_objects()
        elif kind == "lines":
            lines, first = what
            table = pa.table({self._reader.wanted.input[0]: lines})
            yield self._reader.piece(Some(table, part.name, first), first)
        else:
            yield from self._read_table(*what, where=part.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": None}  # an open file does not travel

    # -- what there is ---------------------------------------------------------------------------------------------

    def _found(self, name: str) -> list[str]:
        """The tables at a path; images are kept."""
        if name == STDIN:
            return [name]
        folder = Folder(name)
        info = folder.info()
        if info.type == fs.FileType.NotFound:
            raise UserError(self._path, f"{name}: no such file or folder", "check the path")
        image = isinstance(self._columns[INPUT].column, Image)
        if info.type == fs.FileType.Directory and image:
            return self._folder_of_images(name, folder)
        if image and name.lower().endswith(endings()):
            self._keep(name, info)
            self._images.append((name, None))
            return []
        if info.type == fs.FileType.File and not name.lower().endswith((*ENDINGS, *LINES)):
            what = self._columns[INPUT].column.noun
            known = " ".join([*ENDINGS, *LINES, *([".png .jpg …"] if image else [])])
            raise UserError(name, f"no file of rows, where the model reads {what}", f"give one of {known}")
        return self._tables(name)

    def _tables(self, name: str) -> list[str]:
        found = found_files(name, field=self._path, endings=(*ENDINGS, *LINES))
        for file, about in found:
            self._keep(file, about)
        return [file for file, _ in found]

    def _folder_of_images(self, name: str, folder: Folder) -> list[str]:
        entries = sorted((inside, info) for inside, info in folder.walk() if info.is_file)
        images = [(inside, info) for inside, info in entries if inside.lower().endswith(endings())]
        tables = [inside for inside, _ in entries if inside.lower().endswith(ENDINGS)]
        if not images and tables:
            return self._tables(name)
        if not images:
            raise UserError(self._path, f"{name} holds no images", "give a folder that has some")
        if other := len(entries) - len(images):
            logger.warning("%s: not used: %s files of endings that no image has", name, f"{other:,}")
        for inside, info in images:
            folder.check_name(inside)
            self._keep(inside, info)
            top, slash, _ = inside.partition("/")
            self._images.append((f"{name.rstrip('/')}/{inside}", top if slash else None))
        return []

    def _keep(self, name: str, info: fs.FileInfo) -> None:
        self._files.append((name, info.size, info.mtime_ns))

    def _reader_of(
        self, tables: Sequence[str], wanted: FileColumns, label: str | None, labelled: bool, sentences: bool
    ) -> TableReader:
        """How the tables are read, all as the first of them."""
        reader = TableReader(self._columns, wanted, sentences=sentences)
        first = tables[0]
        if first == STDIN:
            own = label or (wanted.target if TARGET in self._columns or label else None)
            return replace(reader, label=own if labelled else None)
        if _ending(first) in LINES:
            if label is not None:
                raise UserError("--label", f"lines of text have no columns ({first})", "leave it out")
            if not getattr(self._columns[INPUT].column, "vocabulary", ()):
                what = self._columns[INPUT].column.noun
                raise UserError(first, f"a text, where the model reads {what}", f"give one of {' '.join(ENDINGS)}")
            return reader
        file = TabularFile(first)
        known = file.columns
        if label is not None and label not in known:
            raise UserError("--label", f"no column {label!r} in {first}", did_you_mean(label, known))
        own = label or (wanted.target if wanted.target in known and TARGET in self._columns else None)
        return replace(reader, label=own if labelled else None)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _image_parts(self) -> Iterator[Part]:
        rows = part_rows(self._columns)
        for first in range(0, len(self._images), rows):
            end = min(first + rows, len(self._images))
            yield Part(end - first, ("images", first, end), self._path)

    def _table_parts(self, tables: Sequence[str]) -> Iterator[Part]:
        rows, first = part_rows(self._columns), 0
        for name in tables:
            if name == STDIN:
                yield Part(0, (STDIN,), "standard input")
            elif _ending(name) in LINES:
                folder, _, own = name.rpartition("/")
                lines = [line for line in read_lines(Folder(folder or "."), own) if line.strip()]
                for begin in range(0, len(lines), rows):
                    some = lines[begin : begin + rows]
                    yield Part(len(some), ("lines", some, first), name)
                    first += len(some)
            else:
                file = TabularFile(name)
                for column in self._reader.names:
                    file.check(column)
                for group, num in enumerate(file.row_groups(self._reader.names[0])):
                    for begin in range(0, num, rows):
                        end = min(begin + rows, num)
                        yield Part(end - begin, ("table", name, group, begin, end, first), file.where(group))
                        first += end - begin

    # -- rows ------------------------------------------------------------------------------------------------------

    def _read_images(self, first: int, end: int) -> Piece:
        some = self._images[first:end]
        contents = [_content(name) for name, _ in some]
        columns: dict[str, pa.Array] = {self._reader.wanted.input[0]: pa.array(contents, pa.large_binary())}
        if self._reader.label:
            columns[self._reader.label] = pa.array([label for _, label in some], pa.string())
        return self._reader.piece(Some(pa.table(columns), self._path, files=[name for name, _ in some]), first)

    def _read_table(self, name: str, group: int, begin: int, end: int, first: int, *, where: str) -> Iterator[Piece]:
        if self._open is None or not self._open.at(name, group, begin):
            self._open = _Group(name, group, self._reader)
        for row, table in self._open.read(begin, end):
            yield self._reader.piece(Some(table, where, row), first + row - begin)

    def _read_objects(self) -> Iterator[Piece]:
        """JSON objects from standard input."""
        reader, first = self._reader, 0
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(sys.stdin.buffer):
            if line.strip():
                rows.append(_object(line, number))
            if len(rows) == AT_ONCE:
                yield reader.piece(Some(_table_of(rows, reader, first), "standard input", first), first)
                first, rows = first + len(rows), []
            elif len(rows) == 1 and not first and reader.label and reader.label not in rows[0]:
                reader = replace(reader, label=None)  # as the first row is, so are all
                self._reader, self.labelled = reader, False
        if not rows and not first:
            raise UserError("standard input", "no rows", "give a JSON object a line")
        if rows:
            yield reader.piece(Some(_table_of(rows, reader, first), "standard input", first), first)


class GivenTexts:
    """A few texts, a row each: see GivenFiles."""

    labelled, fingerprint = False, ""

    def __init__(
        self, texts: Sequence[str], columns: Mapping[str, StoredColumn], wanted: FileColumns | None, *, path: str
    ) -> None:
        """`columns` are those to read, of which the input takes texts."""
        self._texts, self._path, self._reader = tuple(texts), path, TableReader(columns, wanted or USUAL)
        self.parts = (Part(len(self._texts), self._texts),)

    def read(self, part: Part) -> Iterator[Piece]:
        """All of them."""
        yield self._reader.piece(Some(pa.table({self._reader.wanted.input[0]: self._texts}), self._path), 0)


class _Group:
    """A row group of a table, which parts that follow each other read on and on."""

    def __init__(self, name: str, group: int, reader: TableReader) -> None:
        self._name, self._group = name, group
        self._tables = TabularFile(name).pieces(reader.names, group, rows=PIECE_ROWS, texts=reader.texts)
        self._place, self._rest = 0, pa.table({})

    def at(self, name: str, group: int, row: int) -> bool:
        """Whether what comes next is this row."""
        return (self._name, self._group, self._place) == (name, group, row)

    def read(self, first: int, end: int) -> Iterator[tuple[int, pa.Table]]:
        """The rows from one place to before another, and where each table of them begins."""
        while self._place < end:
            table = self._rest if self._rest.num_rows else next(self._tables)
            start, taken = self._place, min(table.num_rows, end - self._place)
            self._rest, self._place = table.slice(taken), start + taken
            skipped = max(0, first - start)
            if taken > skipped:
                yield start + skipped, table.slice(skipped, taken - skipped)


def replace_input(wanted: FileColumns, name: str) -> FileColumns:
    """The same of one column."""
    return wanted._replace(input=(name,), target=None)


def _object(line: bytes, number: int) -> dict[str, Any]:
    where = f"standard input, line {number + 1}"
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(where, f"no JSON ({error})", "write an object a line") from None
    if not isinstance(found, dict):
        raise UserError(where, f"{type(found).__name__}, and no object", 'write {"column": value, …} for each row')
    return found


def _table_of(rows: Sequence[Mapping[str, Any]], reader: TableReader, first: int) -> pa.Table:
    columns = {}
    for name in reader.names:
        for row, found in enumerate(rows):
            if name not in found:
                check_named(f"standard input, row {first + row}", name, [*found])
        values = [row[name] for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            where = f"standard input, rows {first} to {first + len(rows) - 1}, column {name}"
            raise UserError(where, f"values of several types ({str(error).splitlines()[0]})", "mend them") from None
    return pa.table(columns)


def _content(name: str) -> bytes:
    folder, _, own = name.rpartition("/")
    try:
        return Folder(folder or ("/" if name.startswith("/") else ".")).read_bytes(own)
    except OSError as error:
        raise UserError(name, f"cannot be read ({error})", "check the file") from None


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def as_paths(rows: Any, column: Any) -> list[str] | None:
    """The paths that are given in the place of rows: of files, or texts where the model reads none; None for rows."""
    reads_texts = bool(getattr(column, "vocabulary", ())) or bool(getattr(column, "unit", None))
    kinds = os.PathLike if reads_texts else (str, os.PathLike)
    if isinstance(rows, kinds):
        return [os.fspath(rows)]
    if isinstance(rows, list | tuple) and rows and all(isinstance(row, kinds) for row in rows):
        return [os.fspath(row) for row in rows]
    return None
