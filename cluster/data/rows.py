"""Rows: some rows of a data set as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.data.layouts import Array, array, target_layout
from cluster.data.manifest import Manifest


@dataclass(frozen=True)
class Rows:
    """Some rows as NumPy arrays, which may be read-only views into shared memory.

    `ids` is (rows,) int64; `inputs` (rows, *input_shape) uint8 or float32; `targets` (rows,) int64 labels or
    (rows, outputs) float32 numbers; `condition` (rows, *condition_shape) uint8, None where rows are no pairs.
    """

    ids: NDArray[np.int64]
    inputs: Array
    targets: Array
    condition: Array | None = None

    def at(self, where: slice | Array) -> Self:
        """The rows at these places, or where a mask holds."""
        condition = None if self.condition is None else self.condition[where]
        return type(self)(self.ids[where], self.inputs[where], self.targets[where], condition)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, of which there is at least one, one after the other."""
        conditions = [part.condition for part in parts if part.condition is not None]
        return cls(
            ids=np.concatenate([part.ids for part in parts]),
            inputs=np.concatenate([part.inputs for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            condition=np.concatenate(conditions) if conditions else None,
        )


def table_rows(table: pa.Table, manifest: Manifest) -> Rows:
    """The table's columns as arrays, without a copy where a column is one chunk."""
    shape = manifest.condition_shape
    return Rows(
        ids=array(table["row"], np.dtype(np.int64), ()).astype(np.int64, copy=False),
        inputs=array(table["input"], np.dtype(manifest.input_dtype), manifest.input_shape),
        targets=array(table["target"], *target_layout(manifest.target_kind, manifest.num_outputs)),
        condition=array(table["condition"], np.dtype(np.uint8), shape) if shape else None,
    )
