"""Columns of the user's Parquet files as arrays: images, features, numbers and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import PositiveInt

from cluster.data.layouts import Array
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import Pixels, each, labels, pixels
from cluster.data.sources.pixels import MODES, decode_image
from nn_models.columns import Features, Image, Numbers
from nn_models.errors import UserError

Shape = tuple[PositiveInt, Pixels, Pixels]


class Reader(Protocol):
    """How a column of a data set is read from columns of a file."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the file."""

    @property
    def stored(self) -> StoredColumn:
        """The column of the data set."""

    def read(self, table: pa.Table, where: str) -> Array:
        """(rows, *row_shape). Raises UserError for rows that do not fit."""


@dataclass(frozen=True)
class ArrayColumns:
    """The columns that make up one array a row: one column of images, or several of numbers."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of a row
    dtype: str  # uint8 | float32
    resize: bool  # encoded images of another size
    moments: bool = True  # of images of bytes: whether their mean and std are kept
    whose: str = "the first file has"  # the shape, in errors
    resized_by: str = "data.image_shape"  # what would resize images of another size, in errors

    @property
    def stored(self) -> StoredColumn:
        """See Reader."""
        if len(self.shape) == 1:
            return StoredColumn(column=Features(size=self.shape[0]), dtype="float32")
        if self.dtype == "uint8":
            return pixels(self.shape, moments=self.moments)
        channels, height, width = self.shape
        return StoredColumn(column=Image(shape=(channels, height, width)), dtype="float32")

    def read(self, table: pa.Table, where: str, *, named: Sequence[str] | None = None) -> Array:
        """See Reader. `named` are the rows as errors call them, where that is not by their numbers in the table."""
        if is_encoded(table[self.names[0]].type):
            column = f"{where}, column {self.names[0]}"
            names = named or [f"{column}, row {number}" for number in range(table.num_rows)]
            return self._images(table[self.names[0]], names)
        columns = ", ".join(self.names)
        values = np.concatenate([_numbers(table[name], f"{where}, column {name}") for name in self.names], axis=1)
        if values.shape[1] != int(np.prod(self.shape)):
            raise UserError(
                where,
                f"rows of {values.shape[1]} numbers in {columns} where {self.whose} {self.shape}",
                "mend the file",
            )
        if not np.isfinite(values).all():
            raise UserError(where, f"{columns} hold NaN or infinity", "fill or drop those rows")
        rows = values.reshape(-1, *self.shape)
        return _pixels(rows, f"{where}, column {columns}") if self.dtype == "uint8" else rows

    def _images(self, column: pa.ChunkedArray, names: Sequence[str]) -> Array:
        channels, height, width = self.shape
        field = None if self.resize else self.resized_by

        def read(row: tuple[str, Any]) -> Array:
            name, value = row
            return decode_image(
                _encoded(value),
                name=name,
                channels=channels,
                size=(height, width),
                size_field=field,
                whose=self.whose.replace("file", "image"),
            )

        return np.stack(each(read, zip(names, column.to_pylist(), strict=True)))


@dataclass(frozen=True)
class NumberColumn:
    """The column of the number to predict, or of lists of them."""

    name: str
    size: int

    @property
    def names(self) -> tuple[str, ...]:
        """See Reader."""
        return (self.name,)

    @property
    def stored(self) -> StoredColumn:
        """See Reader."""
        return StoredColumn(column=Numbers(size=self.size), dtype="float32")

    def read(self, table: pa.Table, where: str) -> Array:
        """See Reader."""
        where = f"{where}, column {self.name}"
        numbers = _numbers(table[self.name], where)
        if not np.isfinite(numbers).all():
            raise UserError(where, "NaN or infinity", "fill or drop those rows")
        if numbers.shape[1] != self.size:
            raise UserError(
                where, f"{numbers.shape[1]} numbers a row where the first file has {self.size}", "mend the file"
            )
        return numbers


@dataclass(frozen=True)
class LabelColumn:
    """The column of the class; without a `name` all rows are of the one class that there is."""

    name: str | None
    classes: tuple[str, ...]
    or_numbers: bool = False  # it might hold numbers as well, which is what a column of no labels is told

    @property
    def names(self) -> tuple[str, ...]:
        """See Reader."""
        return (self.name,) if self.name else ()

    @property
    def stored(self) -> StoredColumn:
        """See Reader."""
        return labels(self.classes)

    def read(self, table: pa.Table, where: str) -> Array:
        """See Reader."""
        if self.name is None:
            return np.zeros(table.num_rows, np.int64)
        where = f"{where}, column {self.name}"
        texts = label_texts(table[self.name], where, or_numbers=self.or_numbers)
        found = pc.index_in(texts, pa.array(self.classes, pa.string()))
        if found.null_count:
            unknown = texts.filter(found.is_null())[0].as_py()
            raise UserError(
                where, f"no training row has the class {unknown!r}", "drop such rows, or add some to train on"
            )
        return found.to_numpy().astype(np.int64)


def array_columns(
    first: pa.Table, name: str, columns: tuple[str, ...], *, image_shape: tuple[int, ...] | None, channels: int = 3
) -> ArrayColumns:
    """How these columns are read, from the first row of the file `name`.

    Encoded images have `image_shape`; where it is None their own size, and `channels`.
    """
    kinds = [first.schema.field(column).type for column in columns]
    resize = image_shape is not None
    if len(columns) == 1 and is_encoded(kinds[0]):
        if (channels := image_shape[0] if image_shape else channels) not in MODES:
            raise UserError(
                name,
                f"column {columns[0]} holds encoded images, which cannot be read as {channels} channels",
                "set 1 for grey or 3 for colour",
            )
        if image_shape is None:
            content = _encoded(first[columns[0]][0].as_py())
            image_shape = decode_image(content, name=f"{name}, row 0", channels=channels, size=None).shape
        return ArrayColumns(columns, image_shape, "uint8", resize)
    size = sum(_numbers(first[column], f"{name}, column {column}").shape[1] for column in columns)
    if not size:
        raise UserError(name, f"empty lists in {', '.join(columns)}", "drop those rows")
    if image_shape is None:
        return ArrayColumns(columns, (size,), "float32", resize)
    if size != int(np.prod(image_shape)):
        raise UserError(
            "data.image_shape",
            f"{image_shape} is {int(np.prod(image_shape))} numbers, but rows of {', '.join(columns)} in {name} have "
            f"{size}",
        )
    integers = all(pa.types.is_integer(_innermost(kind)) for kind in kinds)
    return ArrayColumns(columns, image_shape, "uint8" if integers else "float32", resize)


def number_column(first: pa.Table, name: str, column: str) -> NumberColumn:
    """How the column is read, from the first row of the file `name`."""
    return NumberColumn(column, _numbers(first[column], f"{name}, column {column}").shape[1])


def holds_fractions(column: pa.ChunkedArray) -> bool:
    """Whether a column has a type of fractions, in lists of any depth."""
    return pa.types.is_floating(_innermost(column.type))


def are_numbers(column: pa.ChunkedArray | pa.Array) -> bool:
    """Whether a column has a type of numbers, in lists of any depth."""
    kind = _innermost(column.type)
    return any(of_kind(kind) for of_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def label_texts(column: pa.ChunkedArray, where: str, *, or_numbers: bool) -> pa.ChunkedArray:
    """A column of labels as their names. Raises UserError for what are no labels.

    `or_numbers`: it might hold numbers as well, which is what a column of no labels is told.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            fix = "set data.target_kind to number, or " if or_numbers else ""
            raise UserError(
                where, "fractions are no labels", f"{fix}make them whole numbers", names=("data.target_kind",)
            ) from None
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text(kind)):
        or_numbers = or_numbers and are_numbers(column)
        fix = "make them text or whole numbers" + (", or set data.target_kind to number" if or_numbers else "")
        raise UserError(where, f"values of type {column.type} are no labels", fix, names=("data.target_kind",))
    return column.cast(pa.string())


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_encoded(kind: pa.DataType) -> bool:
    """Whether values of a type are images as files hold them."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)


def is_any_list(kind: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _innermost(kind: pa.DataType) -> pa.DataType:
    """The type of the values in lists of any depth."""
    return _innermost(kind.value_type) if is_any_list(kind) else kind


def _encoded(value: Any) -> bytes:
    """The bytes of an encoded image; data sets of the Hugging Face hub wrap them in {bytes, path}."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else b""


def _numbers(column: pa.ChunkedArray, where: str) -> NDArray[np.float32]:
    """A numeric column, or one of equally long lists (of lists), as (rows, numbers) float32."""
    array = pa.concat_arrays(column.chunks)
    rows = len(array)
    while is_any_list(array.type):
        lengths = pc.list_value_length(array).unique()
        if len(lengths) != 1:
            sizes = ", ".join(map(str, lengths.to_pylist()))
            raise UserError(where, f"lists of different lengths ({sizes})", "make them equally long")
        array = array.flatten()
    if not are_numbers(array):
        raise UserError(where, f"values of type {array.type} are not numbers", "choose numeric columns")
    # not safe: whole numbers past 2^24 are rounded, as fractions are
    return array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False).reshape(rows, -1)


def _pixels(values: NDArray[np.float32], where: str) -> NDArray[np.uint8]:
    """Numbers as uint8, none of them changed."""
    bad = values[(values < 0) | (values > 255) | (values != np.floor(values))]
    if len(bad):
        raise UserError(
            where,
            f"{bad[0]:g} is no pixel",
            "images of whole numbers hold 0 to 255, so rescale them, or store the column as floats",
        )
    return values.astype(np.uint8)
