"""Tabular: rows of a user's Parquet, CSV, TSV or JSON-lines files, as Arrow tables of named columns."""

import codecs
import csv as python_csv
import io
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from pyarrow import csv, fs, json

from cluster.data.tables import ParquetFile, UnreadableError
from cluster.storage import Folder
from nn_models.errors import Problem, UserError, did_you_mean

PARQUET = (".parquet", ".pq")
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
ENDINGS = (*PARQUET, *SEPARATORS, *JSON_LINES)
LARGEST_BLOCK = 2**31 - 1  # bytes that pyarrow takes at once: in one block all rows have one say in a column's type
FIRST_ROW = 2  # as pyarrow counts, for whom the header is 1
BLOCK_BYTES = 1 << 16
MOST_TOLD = 20  # bad rows that are told one by one


class TabularFile:
    """A user's file of rows with named columns; what it is follows from the end of its name.

    A CSV file has a header, and its values may be quoted; an empty value is none, but for columns of text. A line of
    a JSON-lines file is an object; a name that it lacks is an empty value. Both are UTF-8.
    """

    def __init__(self, name: str) -> None:
        """`name` is a path or a URI. Raises UserError for what is no such file, or cannot be read."""
        self.name = name
        self._ending = _ending(name)
        if self._ending not in ENDINGS:
            raise UserError(name, f"the name of a file of rows ends in {' '.join(ENDINGS)}", "rename it")

    @property
    def columns(self) -> list[str]:
        """The names of its columns; of JSON lines, of all that a line has."""
        if self._ending in PARQUET:
            return list(open_parquet(self.name).schema.names)
        return self._header if self._ending in SEPARATORS else list(self._objects.column_names)

    def row_groups(self, column: str) -> list[int]:
        """Rows in each piece that can be read at once: a row group; CSV and JSON lines are one piece."""
        return open_parquet(self.name).row_groups if self._ending in PARQUET else [self.read([column]).num_rows]

    def where(self, group: int) -> str:
        """As errors call a row group."""
        return f"{self.name}, row group {group}" if self._ending in PARQUET else self.name

    def check(self, column: str) -> None:
        """Raise UserError where the file has no such column, several, or one whose values are not plain."""
        names = self.columns
        check_named(self.name, column, names, fix=self._other_separator(names))
        if self._ending in PARQUET:
            check_plain(self.name, open_parquet(self.name), column)

    def read(self, columns: Sequence[str], group: int | None = None, *, texts: Sequence[str] = ()) -> pa.Table:
        """These columns of one row group, or of the whole file, without metadata.

        `texts` are those whose values are text even where they look like numbers, times or the names of nothing.
        Raises UserError naming the file, and where it can the row, for what is damaged or does not fit.
        """
        columns = list(dict.fromkeys(columns))
        if self._ending in PARQUET:
            return read_parquet(self.name, columns, group)
        for column in columns:
            self.check(column)
        texts = [name for name in texts if name in columns]
        return self._csv(columns, texts) if self._ending in SEPARATORS else self._json_of(columns, texts)

    def pieces(self, columns: Sequence[str], group: int, *, rows: int, texts: Sequence[str] = ()) -> Iterator[pa.Table]:
        """The same of one row group, so many rows at once; of Parquet files no more is in memory."""
        if self._ending not in PARQUET:
            table = self.read(columns, group, texts=texts)
            yield from (table.slice(first, rows) for first in range(0, table.num_rows, rows))
            return
        try:
            yield from open_parquet(self.name).batches(columns, group, rows=rows)
        except UnreadableError as error:
            raise _damaged(self.name, error) from None

    def _other_separator(self, names: Sequence[str]) -> str | None:
        ours = SEPARATORS.get(self._ending)
        other = next((mark for mark in ";\t|," if len(names) == 1 and mark in names[0] and mark != ours), None)
        if ours and other:  # its header is one name
            return f"separate values by {ours!r} and not by {other!r}: {names[0]}"
        return None

    @cached_property
    def _content(self) -> pa.Buffer:
        content = read_content(self.name)
        _check_text(self.name, content)
        return content

    @cached_property
    def _header(self) -> list[str]:
        text = io.TextIOWrapper(pa.BufferReader(self._content), "utf-8-sig", newline="")
        try:
            rows = python_csv.reader(text, delimiter=SEPARATORS[self._ending])
            return next((row for row in rows if row), [])
        except python_csv.Error as error:
            raise UserError(self.name, f"no header that can be read ({error})", "mend its first line") from None

    def _parse_options(self) -> csv.ParseOptions:
        return csv.ParseOptions(delimiter=SEPARATORS[self._ending], newlines_in_values=True)

    def _csv(self, columns: Sequence[str], texts: Sequence[str]) -> pa.Table:
        bad: list[csv.InvalidRow] = []

        def remember(row: csv.InvalidRow) -> str:
            bad.append(row)
            return "skip"

        parsing = self._parse_options()
        parsing.invalid_row_handler = remember
        types = {name: pa.string() for name in texts}
        try:
            table = csv.read_csv(
                pa.BufferReader(self._content),
                # in one thread, which is what counts rows
                read_options=csv.ReadOptions(block_size=_block(self._content), use_threads=False),
                parse_options=parsing,
                convert_options=csv.ConvertOptions(include_columns=list(columns), column_types=types),
            )
        except pa.ArrowException as error:
            raise UserError(self.name, f"no CSV that can be read ({_plain(error)})", "mend the file") from None
        if bad:
            fix = "quote values that have a separator in them, or mend the row"
            told = [
                Problem(
                    f"{self.name}, row {row.number - FIRST_ROW}",
                    f"{row.actual_columns} values where the header has {row.expected_columns} names: {row.text[:60]!r}",
                    fix,
                )
                for row in bad[:MOST_TOLD]
            ]
            more = len(bad) - MOST_TOLD
            raise UserError.of([*told, *([Problem(self.name, f"{more:,} more such rows", fix)] if more > 0 else [])])
        return table

    def _json_of(self, columns: Sequence[str], texts: Sequence[str]) -> pa.Table:
        table = self._objects.select(columns)
        times = {name: _texts(table[name].type) for name in texts if table[name].type != _texts(table[name].type)}
        return self._json(times).select(columns) if times else table

    @cached_property
    def _objects(self) -> pa.Table:
        return self._json({})

    def _json(self, types: dict[str, pa.DataType]) -> pa.Table:
        """All columns; those that look like times are times, but where another type is given."""
        if bytes(self._content[:BLOCK_BYTES]).lstrip().startswith(b"["):
            raise UserError(self.name, "one list, where each line should be an object", "write a line for each row")
        try:
            return json.read_json(
                pa.BufferReader(self._content),
                read_options=json.ReadOptions(block_size=_block(self._content), use_threads=False),
                parse_options=json.ParseOptions(explicit_schema=pa.schema(list(types.items()))) if types else None,
            )
        except pa.ArrowException as error:
            row = re.fullmatch(r"(.*?):? in row (\d+)", _plain(error).removeprefix("JSON parse error: "))
            where = f"{self.name}, row {row[2]}" if row else self.name
            what = row[1].rstrip(".") if row else _plain(error)
            raise UserError(where, f"no JSON lines that can be read ({what})", "mend the line") from None


def read_content(name: str) -> pa.Buffer:
    """The content of the file at a path or a URI. Raises UserError where it cannot be read."""
    folder = Folder(name)
    try:
        with folder.filesystem.open_input_file(folder.path) as file:
            return file.read_buffer()
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(name, f"cannot be read ({reason})", "check the path and permissions") from None


def found_files(path: str, *, field: str, endings: Sequence[str] = ENDINGS) -> list[tuple[str, fs.FileInfo]]:
    """The file, or all files of a folder whose names end so, sorted: the name, as a user would write it, of each.

    Without endings any name will do; hidden files are left out.

    `path` is a path or a URI, `field` where the recipe has it. Raises UserError where there is none.
    """
    folder = Folder(path)
    info = folder.info()
    wanted = "give Parquet files" if tuple(endings) == PARQUET else "check the path"
    if info.type == fs.FileType.File:
        return [(folder.uri, info)]
    if info.type == fs.FileType.NotFound:
        raise UserError(field, f"{path}: no such file or folder", wanted)
    if info.type != fs.FileType.Directory:  # a device or a pipe need not end
        raise UserError(field, f"{path}: neither a file nor a folder", "give a file")
    files = [(name, info) for name, info in folder.walk() if info.is_file and (not endings or _ending(name) in endings)]
    if not files:
        listed = ".parquet " if tuple(endings) == PARQUET else "".join(f"{ending} " for ending in endings)
        raise UserError(field, f"{path}: no {listed}files in this folder", "give one that has some")
    for name, _ in files:
        folder.check_name(name)
    return [((folder / name).uri, info) for name, info in files]


def open_parquet(name: str) -> ParquetFile:
    """The Parquet file at a path or a URI. Raises UserError for what is none."""
    folder = Folder(name)
    try:
        return ParquetFile(folder.filesystem.open_input_file(folder.path), pre_buffer=True)
    except (UnreadableError, OSError) as error:
        raise UserError(name, f"not a readable Parquet file ({error})", "replace or remove it") from None


def read_parquet(name: str, columns: Sequence[str], group: int | None = None) -> pa.Table:
    """Columns of one row group, or of the whole file. Raises UserError for damaged content."""
    file = open_parquet(name)
    try:
        return file.read(columns, group)
    except UnreadableError as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: UnreadableError) -> UserError:
    return UserError(name, f"damaged Parquet file ({error})", "replace or remove it")


def check_plain(name: str, file: ParquetFile, column: str) -> None:
    """Raise UserError where the values of a column are not plain."""
    if extension := file.extension(column):
        raise UserError(
            name,
            f"column {column} is of the extension type {extension}, which is not read: its values may be code",
            "store it as plain numbers, lists, text or bytes",
        )


def check_named(name: str, column: str, names: Sequence[str], *, fix: str | None = None) -> None:
    """Raise UserError where the file's columns of these names are not exactly one of this name."""
    if (count := names.count(column)) > 1:
        raise UserError(name, f"{count} columns are named {column!r}", "rename them")
    if not count:
        raise UserError(name, f"no column {column!r}", fix or did_you_mean(column, names))


def _ending(name: str) -> str:
    return PurePosixPath(name.partition("?")[0] if "://" in name else name).suffix.lower()


def _block(content: pa.Buffer) -> int:
    return min(LARGEST_BLOCK, max(BLOCK_BYTES, len(content)))


def _texts(kind: pa.DataType) -> pa.DataType:
    """The type with texts in the place of times, in lists of any depth."""
    if pa.types.is_list(kind):
        return pa.list_(_texts(kind.value_type))
    return pa.string() if pa.types.is_temporal(kind) else kind


def _check_text(name: str, content: pa.Buffer) -> None:
    """Raise UserError for what is empty or no text in UTF-8, naming the first bad byte."""
    if not bytes(content[:BLOCK_BYTES]).strip() and not bytes(content).strip():
        raise UserError(name, "an empty file", "give one with rows")
    octets = np.frombuffer(content, np.uint8)
    if not octets[place := int(octets.argmin())]:
        raise UserError(name, f"no UTF-8 text (a zero at byte {place})", "convert it to UTF-8, or mend the file")
    decoder, seen, held = codecs.getincrementaldecoder("utf-8")(), 0, 0
    try:
        for seen in range(0, len(content), BLOCK_BYTES):
            held = len(decoder.getstate()[0])  # bytes of a character that the last block had the first part of
            decoder.decode(bytes(content[seen : seen + BLOCK_BYTES]), final=seen + BLOCK_BYTES >= len(content))
    except UnicodeDecodeError as error:
        place = seen - held + error.start
        raise UserError(name, f"no UTF-8 text (byte {place})", "convert it to UTF-8, or mend the file") from None


def _plain(error: Exception) -> str:
    """The first line of what pyarrow says."""
    return str(error).strip().splitlines()[0][:200]
