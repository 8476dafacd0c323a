"""parquet: the user's own columns; shards: a data set that `manta data prepare` has written."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import Field, PositiveInt

from cluster.data.manifest import TargetKind
from cluster.data.sources.base import Array, Columns, DataSpec, DrawnTestSpec, Part
from cluster.data.sources.pixels import decode_image
from cluster.storage import Folder
from nn_models.errors import UserError, did_you_mean

Shape = tuple[PositiveInt, PositiveInt, PositiveInt]


@dataclass(frozen=True)
class ParquetColumns:
    """Parts are (file, row group)."""

    columns: Columns
    pools: dict[str, list[Part]]
    inputs: tuple[str, ...]
    target: str

    def load(self, part: Part) -> tuple[Array, Array]:
        """See Source."""
        file, group = part.what
        table = _open(file).read_row_group(group, columns=[*self.inputs, self.target])
        where = f"{file}, row group {group}"
        for name in table.column_names:
            if table[name].null_count:
                raise UserError(f"{where}: column {name} has {table[name].null_count} empty values; fill or drop them")
        return self._inputs(table, where), self._targets(table[self.target], where)

    def _inputs(self, table: pa.Table, where: str) -> Array:
        shape = self.columns.input_shape
        if self.columns.input_dtype == "float32":
            columns = [_numbers(table[name]) for name in self.inputs]
            values = np.concatenate(columns, axis=1)
            if values.shape[1:] != shape and values.shape[1] != int(np.prod(shape)):
                raise UserError(
                    f"{where}: rows of {values.shape[1]} numbers where the first file has {shape}; mend the file"
                )
            if not np.isfinite(values).all():
                raise UserError(f"{where}: {', '.join(self.inputs)} hold NaN or infinity; fill or drop those rows")
            return values.reshape(-1, *shape)
        column = table[self.inputs[0]].combine_chunks()
        if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
            return _numbers(table[self.inputs[0]]).reshape(-1, *shape).astype(np.uint8)
        rows = (f"{where}, row {row}, column {self.inputs[0]}" for row in range(len(column)))
        channels, height, width = shape
        return np.stack(
            [
                decode_image(_encoded(value), name=name, channels=channels, size=(height, width))
                for name, value in zip(rows, column.to_pylist(), strict=True)
            ]
        )

    def _targets(self, column: pa.ChunkedArray, where: str) -> Array:
        if self.columns.target_kind == "number":
            return _numbers(column)
        labels = pc.index_in(column.cast(pa.string()), pa.array(self.columns.class_names, pa.string()))
        if labels.null_count:
            raise UserError(f"{where}: column {self.target} holds a class that the other files do not; mend the file")
        return labels.to_numpy().astype(np.int64)


class ParquetSpec(DrawnTestSpec):
    """Columns of Parquet files: images (encoded bytes, or fixed-size lists of 0 to 255) or numeric features."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="a Parquet file or a folder of them, local or a URI")
    test_path: str | None = Field(None, description="the test split, where it stands apart")
    input: str | tuple[str, ...] = Field(description="the column with the input, or several numeric columns")
    target: str = Field(description="the column with the label or number to predict")
    target_kind: TargetKind | None = Field(None, description="label or number; numbers for float columns by default")
    image_shape: Shape | None = Field(
        None, description="(channels, height, width) of images; needed for lists, and to resize encoded images"
    )

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        paths = {"path": self.path, "test_path": self.test_path}
        local = {name: str(Path(base, path).absolute()) for name, path in paths.items() if path and "://" not in path}
        return self.model_copy(update=local)

    @cached_property
    def _files(self) -> dict[str, list[fs.FileInfo]]:
        paths = {"train": self.path, "test": self.test_path}
        return {pool: _parquet_files(path, pool) for pool, path in paths.items() if path}

    def fingerprint(self) -> str:
        """See DataSpec."""
        files = [(info.path, info.size, info.mtime_ns) for infos in self._files.values() for info in infos]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def open(self) -> ParquetColumns:
        """See DataSpec. Reads the files' schemas, and the target column for the names of the classes."""
        inputs = (self.input,) if isinstance(self.input, str) else tuple(self.input)
        pools: dict[str, list[Part]] = {}
        for pool, infos in self._files.items():
            base = self.path if pool == "train" else str(self.test_path)
            pools[pool] = []
            for info in infos:
                name = _name(base, info)
                file = _open(name)
                for column in (*inputs, self.target):
                    if column not in file.schema_arrow.names:
                        hint = did_you_mean(column, file.schema_arrow.names)
                        raise UserError(f"{name}: no column {column!r}; {hint}")
                groups = range(file.metadata.num_row_groups)
                pools[pool] += [Part(file.metadata.row_group(g).num_rows, (name, g)) for g in groups]
            pools[pool] = [part for part in pools[pool] if part.rows]
            if not pools[pool]:
                raise UserError(f"{base}: no rows in these Parquet files; give files with data")
        return ParquetColumns(self._columns(pools, inputs), pools, inputs, self.target)

    def _columns(self, pools: dict[str, list[Part]], inputs: tuple[str, ...]) -> Columns:
        name, group = pools["train"][0].what
        file = _open(name)
        shape, dtype = self._input_layout(file, name, inputs)
        target = file.schema_arrow.field(self.target).type
        kind = self.target_kind or ("number" if pa.types.is_floating(target) else "label")
        if kind == "number":
            return Columns(
                shape, dtype, "number", _numbers(file.read_row_group(group, [self.target])[self.target]).shape[1]
            )
        files = dict.fromkeys(part.what[0] for parts in pools.values() for part in parts)
        values = {
            value for file in files for value in _open(file).read([self.target])[self.target].unique().to_pylist()
        }
        if None in values:
            raise UserError(f"{self.path}: column {self.target} has empty values; fill or drop them")
        names = [str(value) for value in sorted(values)]
        if len(names) < 2:
            raise UserError(f"{self.path}: column {self.target} holds {len(names)} class; at least two are needed")
        return Columns(shape, dtype, "label", len(names), tuple(names))

    def _input_layout(self, file: pq.ParquetFile, name: str, inputs: tuple[str, ...]) -> tuple[tuple[int, ...], str]:
        kinds = [file.schema_arrow.field(column).type for column in inputs]
        if len(inputs) == 1 and (_is_bytes(kinds[0]) or pa.types.is_struct(kinds[0])):
            if self.image_shape:
                return self.image_shape, "uint8"
            first = _encoded(next(file.iter_batches(1, columns=list(inputs)))[0][0].as_py())
            return decode_image(first, name=f"{name}, row 0", channels=3, size=None).shape, "uint8"
        first = next(file.iter_batches(1, columns=list(inputs)))
        size = sum(_numbers(pa.chunked_array([first[column]])).shape[1] for column in inputs)
        if self.image_shape is None:
            return (size,), "float32"
        if size != int(np.prod(self.image_shape)):
            raise UserError(
                f"data.image_shape: {self.image_shape} is {int(np.prod(self.image_shape))} numbers, but rows of "
                f"{', '.join(inputs)} in {name} have {size}"
            )
        integers = all(
            pa.types.is_integer(kind) or pa.types.is_integer(getattr(kind, "value_type", kind)) for kind in kinds
        )
        return self.image_shape, "uint8" if integers and len(inputs) == 1 else "float32"


def _parquet_files(path: str, pool: str) -> list[fs.FileInfo]:
    folder = Folder(path)
    field = "data.path" if pool == "train" else "data.test_path"
    info = folder.filesystem.get_file_info(folder.path)
    if info.type == fs.FileType.File:
        return [info]
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{field}: {path}: no such file or folder; give Parquet files")
    found = folder.filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
    files = sorted((info for info in found if info.path.endswith((".parquet", ".pq"))), key=lambda info: info.path)
    if not files:
        raise UserError(f"{field}: {path}: no .parquet files in this folder; give one that has some")
    return files


def _name(base: str, info: fs.FileInfo) -> str:
    """The file's path as a user would write it, with the scheme of `base`."""
    return info.path if "://" not in base else f"{base.split('://')[0]}://{info.path.lstrip('/')}"


def _open(name: str) -> pq.ParquetFile:
    filesystem, path = Folder(name).filesystem, Folder(name).path
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{name}: not a readable Parquet file ({error}); replace or remove it") from None


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _encoded(value: Any) -> bytes:
    """The bytes of an encoded image; data sets of the Hugging Face hub wrap them in {bytes, path}."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else b""


def _numbers(column: pa.ChunkedArray) -> Array:
    """A numeric column, or one of equally long lists, as (rows, numbers) float32."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    rows = len(array)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.list_value_length(array).unique()
        if len(lengths) != 1:
            raise UserError(
                f"lists of different lengths ({', '.join(map(str, lengths.to_pylist()))}); make them equally long"
            )
        array = array.flatten()
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        raise UserError(f"values of type {array.type} are not numbers; choose numeric columns")
    return array.cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(rows, -1)


class ShardsSpec(DataSpec):
    """A data set that `manta data prepare` has written; its splits are fixed."""

    kind: Literal["shards"] = "shards"
    path: str = Field(description="the folder with manifest.json, local or a URI")

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self if "://" in self.path else self.model_copy(update={"path": str(Path(base, self.path).absolute())})
