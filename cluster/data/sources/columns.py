"""parquet: the user's own columns; shards: a data set that `manta data prepare` has written."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs
from pydantic import Field, PositiveInt

from cluster.data.manifest import TargetKind
from cluster.data.sources.base import Array, Columns, DataSpec, DrawnTestSpec, Part, Pixels, absolute
from cluster.data.sources.pixels import MODES, decode_image
from cluster.storage import Folder
from nn_models.errors import UserError, did_you_mean

Shape = tuple[PositiveInt, Pixels, Pixels]


@dataclass(frozen=True)
class ArrayColumns:
    """The columns that make up one array a row: one column of images, or several of numbers."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of a row
    dtype: str  # uint8 | float32
    resize: bool  # encoded images of another size

    def read(self, table: pa.Table, where: str) -> Array:
        """(rows, *shape). Raises UserError for rows that do not fit."""
        if _is_encoded(table[self.names[0]].type):
            return self._images(table[self.names[0]], f"{where}, column {self.names[0]}")
        columns = ", ".join(self.names)
        values = np.concatenate([_numbers(table[name], f"{where}, column {name}") for name in self.names], axis=1)
        if values.shape[1] != int(np.prod(self.shape)):
            raise UserError(
                f"{where}: rows of {values.shape[1]} numbers in {columns} where the first file has {self.shape}; "
                "mend the file"
            )
        if not np.isfinite(values).all():
            raise UserError(f"{where}: {columns} hold NaN or infinity; fill or drop those rows")
        rows = values.reshape(-1, *self.shape)
        return _pixels(rows, f"{where}, column {columns}") if self.dtype == "uint8" else rows

    def _images(self, column: pa.ChunkedArray, where: str) -> Array:
        channels, height, width = self.shape
        field = None if self.resize else "data.image_shape"
        return np.stack(
            [
                decode_image(
                    _encoded(value),
                    name=f"{where}, row {row}",
                    channels=channels,
                    size=(height, width),
                    size_field=field,
                )
                for row, value in enumerate(column.to_pylist())
            ]
        )


@dataclass(frozen=True)
class ParquetColumns:
    """Parts are (file, row group). Without a `target` all rows are of the one class that `columns` names."""

    columns: Columns
    pools: dict[str, list[Part]]
    input: ArrayColumns
    target: str | None
    condition: ArrayColumns | None = None

    def load(self, part: Part) -> tuple[Array, Array] | tuple[Array, Array, Array]:
        """See Source."""
        file, group = part.what
        conditions = self.condition.names if self.condition else ()
        table = _read(file, group, [*self.input.names, *conditions, *([self.target] if self.target else [])])
        where = f"{file}, row group {group}"
        for name in table.column_names:
            if table[name].null_count:
                raise UserError(f"{where}: column {name} has {table[name].null_count} empty values; fill or drop them")
        inputs, targets = self.input.read(table, where), self._targets(table, where)
        return (inputs, targets, self.condition.read(table, where)) if self.condition else (inputs, targets)

    def _targets(self, table: pa.Table, where: str) -> Array:
        if self.target is None:
            return np.zeros(table.num_rows, np.int64)
        column, where = table[self.target], f"{where}, column {self.target}"
        if self.columns.target_kind == "number":
            numbers = _numbers(column, where)
            if not np.isfinite(numbers).all():
                raise UserError(f"{where}: NaN or infinity; fill or drop those rows")
            if numbers.shape[1] != self.columns.num_outputs:
                raise UserError(
                    f"{where}: {numbers.shape[1]} numbers a row where the first file has {self.columns.num_outputs}; "
                    "mend the file"
                )
            return numbers
        names = _labels(column, where, or_numbers=self.condition is None)
        labels = pc.index_in(names, pa.array(self.columns.class_names, pa.string()))
        if labels.null_count:
            unknown = names.filter(labels.is_null())[0].as_py()
            raise UserError(
                f"{where}: no training row has the class {unknown!r}; drop such rows, or add some to train on"
            )
        return labels.to_numpy().astype(np.int64)


class ParquetSpec(DrawnTestSpec):
    """Columns of Parquet files: images (encoded bytes, or fixed-size lists of 0 to 255) or numeric features."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1, description="a Parquet file or a folder of them, local or a URI")
    test_path: str | None = Field(None, description="the test split, where it stands apart")
    input: str | tuple[str, ...] = Field(description="the column with the input, or several numeric columns")
    target: str = Field(description="the column with the label or number to predict")
    target_kind: TargetKind | None = Field(None, description="label or number; numbers for float columns by default")
    image_shape: Shape | None = Field(
        None, description="(channels, height, width) of images; needed for lists, and to resize encoded images"
    )

    @property
    def _files(self) -> "ParquetFiles":
        return ParquetFiles(self.path, self.test_path)

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update=self._files.resolved(base))

    def fingerprint(self) -> str:
        """See DataSpec."""
        return self._files.fingerprint()

    def open(self) -> ParquetColumns:
        """See DataSpec. Reads the files' schemas, and the target column for the names of the classes."""
        inputs = (self.input,) if isinstance(self.input, str) else tuple(self.input)
        if not inputs:
            raise UserError("data.input: names no column; give at least one")
        pools = self._files.parts((*inputs, self.target))
        name, first = first_row(pools["train"], [*inputs, self.target])
        array = array_columns(first, name, inputs, image_shape=self.image_shape)
        return ParquetColumns(self._columns(pools["train"], name, first, array), pools, array, self.target)

    def _columns(self, parts: Sequence[Part], name: str, first: pa.Table, array: ArrayColumns) -> Columns:
        target = first.schema.field(self.target).type
        kind = self.target_kind or ("number" if pa.types.is_floating(_innermost(target)) else "label")
        if kind == "number":
            numbers = _numbers(first[self.target], f"{name}, column {self.target}")
            return Columns(array.shape, array.dtype, "number", numbers.shape[1])
        names = class_names(parts, self.target, or_numbers=True)
        if len(names) < 2:
            raise UserError(f"{self.path}: column {self.target} holds {len(names)} class; at least two are needed")
        return Columns(array.shape, array.dtype, "label", len(names), names)


@dataclass(frozen=True)
class ParquetFiles:
    """The user's files, those of the test split apart where there are some."""

    path: str
    test_path: str | None

    def resolved(self, base: str) -> dict[str, str]:
        """The fields `path` and `test_path` made absolute against the directory `base`."""
        paths = {"path": self.path, "test_path": self.test_path}
        return {name: absolute(path, base) for name, path in paths.items() if path}

    def fingerprint(self) -> str:
        """Changes when a file does."""
        files = [(name, info.size, info.mtime_ns) for found in self._found().values() for name, info in found]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def parts(self, columns: Sequence[str]) -> dict[str, list[Part]]:
        """Pool -> its row groups. Raises UserError for files without one of these columns, or without rows."""
        pools: dict[str, list[Part]] = {}
        for pool, found in self._found().items():
            pools[pool] = []
            for name, _ in found:
                file = _open(name)
                for column in columns:
                    if (count := file.schema_arrow.names.count(column)) > 1:
                        raise UserError(f"{name}: {count} columns are named {column!r}; rename them")
                    if not count:
                        hint = did_you_mean(column, file.schema_arrow.names)
                        raise UserError(f"{name}: no column {column!r}; {hint}")
                groups = range(file.metadata.num_row_groups)
                pools[pool] += [Part(file.metadata.row_group(g).num_rows, (name, g)) for g in groups]
            pools[pool] = [part for part in pools[pool] if part.rows]
            if not pools[pool]:
                base = self.path if pool == "train" else self.test_path
                raise UserError(f"{base}: no rows in these Parquet files; give files with data")
        return pools

    def _found(self) -> dict[str, list[tuple[str, fs.FileInfo]]]:
        """Pool -> its files as they are there now."""
        found = {"train": _parquet_files(self.path, "data.path")}
        if self.test_path:
            found["test"] = _parquet_files(self.test_path, "data.test_path")
        return found


def array_columns(
    first: pa.Table, name: str, columns: tuple[str, ...], *, image_shape: tuple[int, ...] | None, channels: int = 3
) -> ArrayColumns:
    """How these columns are read, from the first row of the file `name`.

    Encoded images have `image_shape`; where it is None their own size, and `channels`.
    """
    kinds = [first.schema.field(column).type for column in columns]
    resize = image_shape is not None
    if len(columns) == 1 and _is_encoded(kinds[0]):
        if (channels := image_shape[0] if image_shape else channels) not in MODES:
            raise UserError(
                f"{name}: column {columns[0]} holds encoded images, which cannot be read as {channels} channels; "
                "set 1 for grey or 3 for colour"
            )
        if image_shape is None:
            content = _encoded(first[columns[0]][0].as_py())
            image_shape = decode_image(content, name=f"{name}, row 0", channels=channels, size=None).shape
        return ArrayColumns(columns, image_shape, "uint8", resize)
    size = sum(_numbers(first[column], f"{name}, column {column}").shape[1] for column in columns)
    if not size:
        raise UserError(f"{name}: empty lists in {', '.join(columns)}; drop those rows")
    if image_shape is None:
        return ArrayColumns(columns, (size,), "float32", resize)
    if size != int(np.prod(image_shape)):
        raise UserError(
            f"data.image_shape: {image_shape} is {int(np.prod(image_shape))} numbers, but rows of "
            f"{', '.join(columns)} in {name} have {size}"
        )
    integers = all(pa.types.is_integer(_innermost(kind)) for kind in kinds)
    return ArrayColumns(columns, image_shape, "uint8" if integers else "float32", resize)


def _parquet_files(path: str, field: str) -> list[tuple[str, fs.FileInfo]]:
    """The name, as a user would write it, of each file, sorted."""
    folder = Folder(path)
    info = folder.filesystem.get_file_info(folder.path)
    if info.type == fs.FileType.File:
        return [(folder.uri, info)]
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{field}: {path}: no such file or folder; give Parquet files")
    files = [(name, info) for name, info in folder.walk() if name.endswith((".parquet", ".pq")) and info.is_file]
    if not files:
        raise UserError(f"{field}: {path}: no .parquet files in this folder; give one that has some")
    return [((folder / name).uri, info) for name, info in files]


def _open(name: str) -> pq.ParquetFile:
    folder = Folder(name)
    try:
        return pq.ParquetFile(folder.filesystem.open_input_file(folder.path), pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable Parquet file ({error}); replace or remove it") from None


def _read(name: str, group: int | None, columns: Sequence[str]) -> pa.Table:
    """Columns of one row group, or of the whole file. Raises UserError for damaged content."""
    file, columns = _open(name), list(dict.fromkeys(columns))
    try:
        table = file.read(columns) if group is None else file.read_row_group(group, columns)
        return table.select(columns)  # pyarrow takes a column a.b for a part of the column a
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: damaged Parquet file ({error}); replace or remove it") from None


def first_row(parts: Sequence[Part], columns: Sequence[str]) -> tuple[str, pa.Table]:
    """The first file's name, and these columns of its first row. Raises UserError where one of them is empty."""
    name, _ = parts[0].what
    try:
        columns = list(dict.fromkeys(columns))
        first = pa.Table.from_batches([next(_open(name).iter_batches(1, columns=columns))]).select(columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: damaged Parquet file ({error}); replace or remove it") from None
    for column in first.column_names:
        if first[column].null_count:
            raise UserError(f"{name}, row 0: column {column} has an empty value; fill or drop such rows")
    return name, first


def class_names(parts: Sequence[Part], target: str, *, or_numbers: bool) -> tuple[str, ...]:
    """The names of the classes in these files: whole numbers in their order, others in the alphabet's.

    `or_numbers`: the target might be a number as well, which is what a column of no labels is told.
    """
    names: set[str] = set()
    numeric = True
    for file in dict.fromkeys(part.what[0] for part in parts):
        column = _read(file, None, [target])[target]
        if column.null_count:
            raise UserError(f"{file}: column {target} has {column.null_count} empty values; fill or drop them")
        numeric &= pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        names.update(_labels(column, f"{file}, column {target}", or_numbers=or_numbers).unique().to_pylist())
    return tuple(sorted(names, key=int) if numeric else sorted(names))


def _labels(column: pa.ChunkedArray, where: str, *, or_numbers: bool) -> pa.ChunkedArray:
    """A column of labels as their names."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            fix = "set data.target_kind to number, or " if or_numbers else ""
            raise UserError(f"{where}: fractions are no labels; {fix}make them whole numbers") from None
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
        fix = "make them text or whole numbers" + (", or set data.target_kind to number" if or_numbers else "")
        raise UserError(f"{where}: values of type {column.type} are no labels; {fix}")
    return column.cast(pa.string())


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_encoded(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)


def _is_any_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _innermost(kind: pa.DataType) -> pa.DataType:
    """The type of the values in lists of any depth."""
    return _innermost(kind.value_type) if _is_any_list(kind) else kind


def _encoded(value: Any) -> bytes:
    """The bytes of an encoded image; data sets of the Hugging Face hub wrap them in {bytes, path}."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else b""


def _numbers(column: pa.ChunkedArray, where: str) -> NDArray[np.float32]:
    """A numeric column, or one of equally long lists (of lists), as (rows, numbers) float32."""
    array = pa.concat_arrays(column.chunks)
    rows = len(array)
    while _is_any_list(array.type):
        lengths = pc.list_value_length(array).unique()
        if len(lengths) != 1:
            sizes = ", ".join(map(str, lengths.to_pylist()))
            raise UserError(f"{where}: lists of different lengths ({sizes}); make them equally long")
        array = array.flatten()
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        raise UserError(f"{where}: values of type {array.type} are not numbers; choose numeric columns")
    # not safe: whole numbers past 2^24 are rounded, as fractions are
    return array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False).reshape(rows, -1)


def _pixels(values: NDArray[np.float32], where: str) -> NDArray[np.uint8]:
    """Numbers as uint8, none of them changed."""
    bad = values[(values < 0) | (values > 255) | (values != np.floor(values))]
    if len(bad):
        raise UserError(
            f"{where}: {bad[0]:g} is no pixel; images of whole numbers hold 0 to 255, so rescale them, or store the "
            "column as floats"
        )
    return values.astype(np.uint8)


class ShardsSpec(DataSpec):
    """A data set that `manta data prepare` has written; its splits are fixed."""

    kind: Literal["shards"] = "shards"
    path: str = Field(min_length=1, description="the folder with manifest.json, local or a URI")

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={"path": absolute(self.path, base)})
