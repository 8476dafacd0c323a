"""Layouts: how a column of rows lies in memory and in Arrow."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.data.manifest import TargetKind

Array = NDArray[np.generic]


def array(column: pa.ChunkedArray, dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    """(rows, *shape), without a copy where the column is one chunk."""
    arrays = [_chunk(chunk, dtype, shape) for chunk in column.chunks]
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty((0, *shape), dtype)


def _chunk(chunk: pa.Array, dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    if pa.types.is_fixed_size_binary(chunk.type):
        width = chunk.type.byte_width
        data = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width :][: len(chunk) * width]
        return data.reshape(len(chunk), *shape)
    values = chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
    return values.to_numpy().astype(dtype, copy=False).reshape(len(chunk), *shape)


def arrow_column(values: Array) -> pa.Array:
    """Images become fixed-size binaries (nested types are slow to read from Parquet), numbers stay numbers."""
    if values.ndim == 1:
        return pa.array(values)
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    if flat.dtype == np.uint8:
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])


def target_layout(kind: TargetKind, num_outputs: int) -> tuple[np.dtype, tuple[int, ...]]:
    """A target's type and shape."""
    return (np.dtype(np.int64), ()) if kind == "label" else (np.dtype(np.float32), (num_outputs,))
