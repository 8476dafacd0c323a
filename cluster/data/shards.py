"""Shards: Parquet files of rows (a row id, and the columns), written once, verified when read."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.data.layouts import LENGTH
from cluster.data.manifest import MANIFEST, Shard, StoredColumn, read_manifest
from cluster.data.rows import Rows, no_rows, table_rows
from cluster.data.tables import ParquetFile, UnreadableError
from cluster.storage import Folder
from nn_models.errors import UserError

# A row group is what a streaming rank reads at once: small enough for many lanes, large enough to be read quickly.
ROW_GROUP_BYTES = 2 << 20
ROW_GROUP_ROWS = (32, 2048)  # fewest and most
ROW_GROUPS = 24  # wanted of a shard: as many as there can be lanes


def write_shard(folder: Folder, name: str, rows: Rows, columns: Mapping[str, StoredColumn]) -> Shard:
    """Write one shard of rows with these columns, and return its entry in the manifest."""
    fewest, most = ROW_GROUP_ROWS
    wanted = min(most, max(fewest, -(-len(rows.ids) // ROW_GROUPS)))
    counted = [layout for name, layout in rows.columns.items() if not columns[name].column.predicted]
    row_bytes = sum(layout.nbytes for layout in counted) // len(rows.ids)
    group_rows = max(1, min(wanted, ROW_GROUP_BYTES // max(1, row_bytes)))
    buffer = io.BytesIO()
    pq.write_table(
        rows.to_arrow(),
        buffer,
        row_group_size=group_rows,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,  # a streaming rank reads row groups, never whole files: pages are what it can verify
        store_schema=True,
    )
    content = buffer.getbuffer()
    folder.write_bytes(name, content)
    groups = [min(group_rows, len(rows.ids) - start) for start in range(0, len(rows.ids), group_rows)]
    return Shard(
        file=name,
        rows=len(rows.ids),
        row_groups=tuple(groups),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


class DataSet:
    """A prepared data set: a folder of shards with its manifest."""

    def __init__(self, where: str | Folder) -> None:
        """Raises UserError where there is no manifest, or a shard is missing or has another size than it should."""
        self.folder = where if isinstance(where, Folder) else Folder(where)
        self.manifest = read_manifest(self.folder)
        self._schema = no_rows(self.manifest).to_arrow().schema
        for shards in self.manifest.splits.values():
            for shard in shards:
                self._check_size(shard)

    def _check_size(self, shard: Shard) -> None:
        size = self.folder.size(shard.file)
        if size is None:
            raise self._damaged(shard, "is missing")
        if size != shard.bytes:
            raise self._damaged(shard, f"has {size} bytes where the manifest says {shard.bytes}")

    def _damaged(self, shard: Shard, what: str) -> UserError:
        return UserError(f"{self.folder}/{shard.file}", f"the shard {what}", self.fix)

    @property
    def fix(self) -> str:
        """What a user can do about damaged shards."""
        return f"delete {self.folder} and prepare the data again"

    def shards(self, split: str) -> Sequence[Shard]:
        """The split's shards in the order of their rows; none where there is no such split."""
        return self.manifest.splits.get(split, ())

    def table(self, split: str) -> pa.Table:
        """All rows of a split, each column in one chunk. Raises UserError naming a shard whose checksum differs."""
        tables = [self._verified(shard) for shard in self.shards(split)]
        return pa.concat_tables(tables).combine_chunks() if tables else pa.table({})

    def _verified(self, shard: Shard) -> pa.Table:
        content = self.folder.read_buffer(shard.file)
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise self._damaged(shard, "does not have the checksum of the manifest: it is corrupt")
        try:
            return self._read(shard, ParquetFile(pa.BufferReader(content)))
        except UnreadableError as error:
            raise self._damaged(shard, f"cannot be read ({error})") from None

    def _read(self, shard: Shard, file: ParquetFile, group: int | None = None, **options: bool) -> pa.Table:
        """The shard's rows, or those of a row group, whose types are compared before a value is read."""
        self._compare_types(shard, file)
        # the manifest's own fields: no metadata is left, at any depth
        return file.read(self._schema.names, group, **options).cast(self._schema)

    def _compare_types(self, shard: Shard, file: ParquetFile) -> None:
        for name in file.schema.names:
            if extension := file.extension(name):
                raise self._damaged(shard, f"holds the extension type {extension} in column {name}, which is not read")
        if file.schema.names != self._schema.names:
            there, wanted = ", ".join(file.schema.names), ", ".join(self._schema.names)
            raise self._damaged(shard, f"holds the columns {there} where {MANIFEST} says {wanted}")
        for field, wanted in zip(file.schema, self._schema, strict=True):
            if not field.equals(wanted):
                raise self._damaged(
                    shard, f"holds {_type(field)} in column {field.name} where {MANIFEST} says {_type(wanted)}"
                )

    def lengths(self, split: str, column: str) -> NDArray[np.int32]:
        """(rows,): elements that each row of a split has of a ragged column, read without the rows themselves."""
        name = f"{column}.{LENGTH}"
        parts = [np.empty(0, np.int32)]
        for shard in self.shards(split):
            try:
                with self.folder.filesystem.open_input_file(self.folder.full(shard.file)) as source:
                    file = ParquetFile(source)
                    self._compare_types(shard, file)
                    parts.append(file.read([name])[name].to_numpy())
            except (OSError, UnreadableError) as error:
                self.folder.size(shard.file)  # where the storage itself has gone, this says so
                raise self._damaged(shard, f"cannot be read ({error})") from None
        return np.concatenate(parts)

    def verify(self) -> None:
        """Read every shard and compare its checksum. Raises UserError naming the first that differs."""
        for split in self.manifest.splits:
            for shard in self.shards(split):
                self._verified(shard)

    def row_group_locations(self, split: str) -> list[tuple[Shard, int]]:
        """(shard, index inside it) of each row group of a split, in the order of the row ids."""
        return [(shard, index) for shard in self.shards(split) for index in range(len(shard.row_groups))]

    def read_row_groups(self, where: Sequence[tuple[Shard, int]]) -> Rows:
        """These row groups, one after the other. Raises UserError naming a shard with a damaged page."""
        return Rows.joined(list(self._read_row_groups(where)))

    def _read_row_groups(self, where: Sequence[tuple[Shard, int]]) -> Iterator[Rows]:
        for shard, index in where:
            try:
                with self.folder.filesystem.open_input_file(self.folder.full(shard.file)) as source:
                    # without pre-buffering pyarrow asks storage for each column chunk on its own
                    file = ParquetFile(source, page_checksum_verification=True, pre_buffer=True)
                    table = self._read(shard, file, index, use_threads=False)
            except (OSError, UnreadableError) as error:
                self.folder.size(shard.file)  # where the storage itself has gone, this says so
                raise self._damaged(shard, f"cannot be read ({error})") from None
            # page checksums do not cover the footer, which says how many rows there are
            if table.num_rows != shard.row_groups[index]:
                raise self._damaged(shard, f"has {table.num_rows} rows in row group {index}: it is corrupt")
            yield table_rows(table, self.manifest)


def _type(field: pa.Field) -> str:
    return f"{field.type}{'' if field.nullable else ' not null'}"


SPREAD = 64  # row groups that some rows of a split come from, at least: a source may be sorted by class


def some_rows(data: DataSet, split: str, num_rows: int) -> Rows:
    """So many rows of a split (all where it has no more), in random order, always the same ones.

    Where a split is large they come from some of its row groups, so that not all of it is read.
    """
    generator = np.random.default_rng(0)
    locations = data.row_group_locations(split)
    sizes = data.manifest.row_groups(split)
    chosen: list[int] = []
    found = 0
    for group in generator.permutation(len(locations)).tolist():
        if found >= num_rows and len(chosen) >= SPREAD:
            break
        chosen.append(group)
        found += sizes[group]
    rows = data.read_row_groups([locations[group] for group in sorted(chosen)])
    order: NDArray[np.int64] = generator.permutation(found)[:num_rows]
    return rows.at(order)
