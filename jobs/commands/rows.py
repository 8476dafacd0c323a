"""Rows that a command gives: a table as a CSV or Parquet file, or as CSV on standard output."""

import io
import sys
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from cluster.storage import Folder
from jobs.commands.places import place_of, write_whole

WRITERS = {".csv": csv.write_csv, ".parquet": parquet.write_table}


def rows_place(out: str | None) -> tuple[Folder, str] | None:
    """Where the rows shall go; None for standard output. Raises UserError where they cannot."""
    return None if out is None else place_of(out, tuple(WRITERS), what="a CSV or Parquet file")


def give_rows(table: pa.Table, place: tuple[Folder, str] | None, *, out: str | None) -> str | None:
    """Write the table where `rows_place` said, and return where that is; or print it."""
    if place is None:
        sys.stdout.write(_content(table, ".csv").decode())
        return None
    return write_whole(place, _content(table, f".{place[1].rpartition('.')[2].lower()}"), out=str(out))


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
