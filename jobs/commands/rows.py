"""Rows that a command gives: a table as a CSV or Parquet file, or as CSV on standard output."""

import io
import json
import sys
from collections.abc import Iterable
from typing import IO, Any

import pyarrow as pa
from pyarrow import csv, parquet

from cluster.storage import Folder
from jobs.commands.places import new_file, place_of, write_whole
from nn_models.errors import UserError

WRITERS = {".csv": csv.write_csv, ".parquet": parquet.write_table}


def parquet_place(out: str) -> tuple[Folder, str]:
    """Where rows that are streamed shall go. Raises UserError where they cannot."""
    return place_of(out, (".parquet",), what="a Parquet file")


def predictions_place(out: str, *, overwrite: bool) -> tuple[Folder, str]:
    """Where predictions shall go. Raises UserError where they cannot, or where that is there already."""
    folder, name = place_of(out, (".parquet", ".jsonl"), what="a Parquet or JSON-lines file")
    if folder.exists(name) and not overwrite:
        raise UserError("--out", f"{out} is there already", "give --overwrite to replace it, or another name")
    return folder, name


def rows_place(out: str | None) -> tuple[Folder, str] | None:
    """Where the rows shall go; None for standard output. Raises UserError where they cannot."""
    return None if out is None else place_of(out, tuple(WRITERS), what="a CSV or Parquet file")


def give_rows(table: pa.Table, place: tuple[Folder, str] | None, *, out: str | None) -> str | None:
    """Write the table where `rows_place` said, and return where that is; or print it."""
    if place is None:
        sys.stdout.write(_content(table, ".csv").decode())
        return None
    return write_whole(place, _content(table, f".{place[1].rpartition('.')[2].lower()}"), out=str(out))


def stream_rows(tables: Iterable[pa.Table], place: tuple[Folder, str], *, out: str) -> tuple[str, int]:
    """Write tables as one file, none of them kept; where it is, and its rows. It appears whole or not at all.

    It is a Parquet file, or one of JSON lines, as its name says.

    Raises UserError where it cannot be written, or what making the tables raises: then the file is as it was before.
    """
    with new_file(place, out=out) as file:
        writer, rows = None, 0
        try:
            for table in tables:
                writer = writer or _writer(place[1], file, table.schema)
                writer.write_table(table)
                rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
    return f"{place[0].uri.rstrip('/')}/{place[1]}", rows


class _JsonLines:
    """Writes tables as JSON lines, as ParquetWriter does its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write_table(self, table: pa.Table) -> None:
        """Add the rows."""
        self._file.writelines(json.dumps(row).encode() + b"\n" for row in plain_rows(table))

    def close(self) -> None:
        """All is written already."""


def _writer(name: str, file: IO[bytes], schema: pa.Schema) -> Any:
    return _JsonLines(file) if name.lower().endswith(".jsonl") else parquet.ParquetWriter(file, schema)


def plain_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as JSON can hold them: times as text."""
    times = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
    for name in times:
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array([str(value) for value in table[name].to_pylist()]))
    return list(table.to_pylist())


def _content(table: pa.Table, ending: str) -> bytes:
    buffer = io.BytesIO()
    WRITERS[ending](table, buffer)
    return buffer.getvalue()
