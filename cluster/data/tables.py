"""Tables: Parquet files read as plain columns; the only place where Parquet or Arrow files are read.

Arrow hands the values of a column that names an extension type to whatever has registered that type in the process that
looks at them, and Ray Data has registered one whose values are unpickled: to look at such a column is to run what was
pickled. So types are looked at before a value is, extension types are refused, and no field keeps its metadata, which
is where a type that is unknown here would travel to a process that knows it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EXTENSION = b"ARROW:extension:name"  # in the metadata of a field whose type is not registered in this process


class UnreadableError(Exception):
    """A Parquet file that is damaged, or a column that is not read; as text, why."""


class ParquetFile:
    """A Parquet file whose columns are read as plain values."""

    def __init__(self, source: Any, **options: Any) -> None:
        """`source` is an open file, `options` are those of pyarrow's ParquetFile. Raises UnreadableError."""
        try:
            self._file = pq.ParquetFile(source, **options)
            self.schema: pa.Schema = self._file.schema_arrow
        except Exception as error:  # a registered extension type raises what it likes about what the file says of it
            raise UnreadableError(str(error)) from None

    @property
    def metadata(self) -> pq.FileMetaData:
        """What the file's end says of its row groups and columns; no values are read for it."""
        return self._file.metadata

    @property
    def row_groups(self) -> list[int]:
        """Rows in each row group."""
        metadata = self.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read(self, names: Sequence[str], group: int | None = None, *, use_threads: bool = True) -> pa.Table:
        """These columns of a row group, or of the whole file. Raises UnreadableError."""
        self._refuse_extensions(names)
        names = list(dict.fromkeys(names))
        try:
            if group is None:
                table = self._file.read(names, use_threads=use_threads)
            else:
                table = self._file.read_row_group(group, names, use_threads=use_threads)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableError(str(error)) from None
        return _plain(table, names)

    def batches(self, names: Sequence[str], group: int, *, rows: int) -> Iterator[pa.Table]:
        """These columns of a row group, so many rows at once, and no more in memory. Raises UnreadableError."""
        self._refuse_extensions(names)
        names = list(dict.fromkeys(names))
        try:
            for batch in self._file.iter_batches(rows, row_groups=[group], columns=names):
                yield _plain(pa.Table.from_batches([batch]), names)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableError(str(error)) from None

    def first_row(self, names: Sequence[str]) -> pa.Table:
        """These columns of the first row, of which there must be one. Raises UnreadableError."""
        self._refuse_extensions(names)
        names = list(dict.fromkeys(names))
        try:
            return _plain(pa.Table.from_batches([next(self._file.iter_batches(1, columns=names))]), names)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableError(str(error)) from None

    def extension(self, name: str) -> str | None:
        """The extension type that a column, or a part of it, is of; None where it is plain."""
        return next(filter(None, (_extension(field) for field in self.schema if field.name == name)), None)

    def _refuse_extensions(self, names: Sequence[str]) -> None:
        for name in names:
            if extension := self.extension(name):
                raise UnreadableError(f"column {name} is of the extension type {extension}")


def _plain(table: pa.Table, names: list[str]) -> pa.Table:
    """These columns without metadata."""
    table = table.select(names)  # pyarrow takes a column a.b for a part of the column a
    fields = [field.remove_metadata() for field in table.schema]
    return pa.Table.from_arrays(table.columns, schema=pa.schema(fields))


def _extension(field: pa.Field) -> str | None:
    """The extension type of a field, or of one inside it."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    if field.metadata and EXTENSION in field.metadata:
        return str(field.metadata[EXTENSION].decode(errors="replace"))
    parts = [kind.field(index) for index in range(kind.num_fields)]
    return next(filter(None, map(_extension, parts)), None)
