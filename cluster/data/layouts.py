"""Layouts: how a column of rows lies in memory and in Arrow: dense, of one shape a row; or ragged, rows of elements."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nn_models.columns import Column, RaggedField

if TYPE_CHECKING:  # torch takes seconds to import, and whoever only writes shards does not need it
    import torch
    from torch import Tensor

    from nn_models.batch import Value

Array = NDArray[np.generic]
Where = slice | NDArray[np.int64] | NDArray[np.bool_]

LENGTH = "length"  # beside the fields of a ragged column: what each row weighs, read without the rows


class Layout(Protocol):
    """A column of some rows, as NumPy arrays that may be read-only views into shared memory."""

    def __len__(self) -> int:
        """Rows."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    @property
    def lengths(self) -> NDArray[np.int32] | None:
        """(rows,): elements of each row; None where all rows are of one shape."""

    def take(self, where: Where) -> Self:
        """The rows at these places, or where a mask holds."""

    def joined(self, others: Sequence[Self]) -> Self:
        """These rows and those of the others, one after the other."""

    def to_arrow(self, name: str) -> dict[str, pa.Array]:
        """As columns of a table, by their names."""

    def collate(self, column: Column, device: "torch.device") -> "Value":
        """The rows as models are given them, on the device."""


@dataclass(frozen=True)
class Dense:
    """Every row of one shape: `values` (rows, *shape)."""

    values: Array

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """See Layout."""
        return self.values.nbytes

    @property
    def lengths(self) -> None:
        """See Layout."""
        return None

    def take(self, where: Where) -> "Dense":
        """See Layout."""
        return Dense(self.values[where])

    def joined(self, others: Sequence["Dense"]) -> "Dense":
        """See Layout."""
        return Dense(np.concatenate([self.values, *(other.values for other in others)])) if others else self

    def to_arrow(self, name: str) -> dict[str, pa.Array]:
        """See Layout. Images become fixed-size binaries (nested types are slow to read), numbers stay numbers."""
        values = self.values
        if values.ndim == 1:
            return {name: pa.array(values)}
        flat = np.ascontiguousarray(values).reshape(len(values), math.prod(values.shape[1:]))
        if flat.dtype == np.uint8:
            packed = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)]
            )
            return {name: packed}
        return {name: pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])}

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray, dtype: str, shape: tuple[int, ...]) -> Self:
        """Rows of this shape, without a copy where the column is one chunk."""
        chunks = [_chunk(chunk, np.dtype(dtype), shape) for chunk in column.chunks]
        if len(chunks) == 1:
            return cls(chunks[0])
        return cls(np.concatenate(chunks) if chunks else np.empty((0, *shape), dtype))

    def collate(self, column: Column, device: "torch.device") -> "Value":
        """See Layout."""
        from nn_models.batch import to_device

        return to_device(shared(self.values), device)


@dataclass(frozen=True)
class Ragged:
    """Rows of elements, each of its own length: the fields' `values` (elements, *shape), row after row.

    Row r has the elements from `offsets[r]` to `offsets[r + 1]`, (rows + 1,) int64. Links are places within the same
    row, so they mean the same wherever a row stands.
    """

    fields: Mapping[str, Array]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, fields: Mapping[str, Array], lengths: Any) -> Self:
        """From the rows' lengths."""
        return cls(fields, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        """See Layout."""
        return sum(values.nbytes for values in self.fields.values()) + self.offsets.nbytes

    @property
    def lengths(self) -> NDArray[np.int32]:
        """See Layout."""
        return np.diff(self.offsets).astype(np.int32)

    def take(self, where: Where) -> "Ragged":
        """See Layout."""
        rows = np.arange(len(self))[where]
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged({name: values[index] for name, values in self.fields.items()}, offsets)

    def joined(self, others: Sequence["Ragged"]) -> "Ragged":
        """See Layout."""
        parts = [self, *others]
        fields = {name: np.concatenate([part.fields[name] for part in parts]) for name in self.fields}
        return Ragged.of(fields, np.concatenate([np.diff(part.offsets) for part in parts]))

    def to_arrow(self, name: str) -> dict[str, pa.Array]:
        """See Layout. A list a row for each field, and beside them the lengths."""
        columns = {}
        for field, values in self.fields.items():
            size = math.prod(values.shape[1:])
            offsets = pa.array(self.offsets * size, pa.int64())
            columns[f"{name}.{field}"] = pa.LargeListArray.from_arrays(offsets, pa.array(values.ravel()))
        return {**columns, f"{name}.{LENGTH}": pa.array(self.lengths)}

    @classmethod
    def from_arrow(cls, table: pa.Table, name: str, fields: Mapping[str, RaggedField]) -> Self:
        """The column of this name from all its fields, without a copy where each is one chunk."""
        found: dict[str, Array] = {}
        for field, described in fields.items():
            chunks = table[f"{name}.{field}"].chunks
            flat = [chunk.flatten().to_numpy() for chunk in chunks] or [np.empty(0)]
            values = flat[0] if len(flat) == 1 else np.concatenate(flat)  # one chunk is not copied
            found[field] = values.astype(described.dtype, copy=False).reshape(-1, *described.shape)
        return cls.of(found, table[f"{name}.{LENGTH}"].to_numpy())

    def collate(self, column: Column, device: "torch.device") -> "Value":
        """See Layout."""
        from nn_models.batch import to_device

        lengths = np.diff(self.offsets)
        fields = {name: shared(values) for name, values in self.fields.items()}
        longest = int(lengths.max(initial=0))
        return to_device(column.lay(fields, shared(lengths), longest), device)


def _chunk(chunk: pa.Array, dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    if pa.types.is_fixed_size_binary(chunk.type):
        width = chunk.type.byte_width
        data = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width :][: len(chunk) * width]
        return data.reshape(len(chunk), *shape)
    values = chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
    return values.to_numpy().astype(dtype, copy=False).reshape(len(chunk), *shape)


def shared(array: Array) -> "Tensor":
    """The array as a tensor of the same memory."""
    import torch

    with warnings.catch_warnings():
        # rows in shared memory are read-only, and nothing here writes to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
