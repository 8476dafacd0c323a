"""Small data sets made for the tests, whose every row can be told from the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cluster.data.layouts import Dense, Layout, Ragged
from cluster.data.manifest import StoredColumn
from cluster.data.prepare import prepare
from cluster.data.rows import table_rows
from cluster.data.shards import DataSet
from cluster.data.sources.base import DrawnTestSpec, Part, even_parts, labels
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.split import Traits
from cluster.storage import Folder
from nn_models.columns import Labels, Sequence, Tokens, Tree

NUM_CLASSES = 3


def features(folder: Path, rows: int, *, width: int = 4, seed: int = 0, target: str = "label", **fields) -> ParquetSpec:
    """Rows of `width` normal numbers, their class (which a linear model can learn), or two numbers to predict.

    Their first feature is the row's number in the file.
    """
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, width)).astype(np.float32)
    x[:, 0] = np.arange(rows)
    scores = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6) @ generator.normal(size=(width, NUM_CLASSES))
    labels = scores.argmax(1)
    labels[:NUM_CLASSES] = range(min(rows, NUM_CLASSES))  # every class is there, however few rows there are
    y = pa.array(labels) if target == "label" else _lists(scores[:, :2].astype(np.float32))
    columns = {"x": _lists(x), "y": y}
    return _parquet(folder, columns, **fields)


def images(folder: Path, rows: int, *, shape: tuple[int, int, int] = (3, 6, 5), seed: int = 0, **fields) -> ParquetSpec:
    """Images of noise, brighter for later classes; their first two pixels are the row's number in the file."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % NUM_CLASSES
    pixels = generator.integers(0, 100, (rows, int(np.prod(shape))), dtype=np.uint8)
    pixels += (labels * 60).astype(np.uint8)[:, None]
    pixels[:, 0], pixels[:, 1] = np.divmod(np.arange(rows), 256)
    return _parquet(folder, {"x": _lists(pixels), "y": pa.array(labels)}, image_shape=shape, **fields)


@dataclass(frozen=True)
class MadeSource:
    """Any columns, from memory."""

    columns: Mapping[str, StoredColumn]
    rows: Mapping[str, Layout]
    part_rows: int

    @property
    def pools(self) -> dict[str, list[Part]]:
        """See Source."""
        return {"train": even_parts(len(next(iter(self.rows.values()))), self.part_rows)}

    def load(self, part: Part) -> dict[str, Layout]:
        """See Source."""
        return {name: layout.take(slice(*part.what)) for name, layout in self.rows.items()}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        labelled = "target" in self.columns and self.columns["target"].column.kind == "label"
        return Traits(self.load(part)["target"].values if labelled else None)


class MadeSpec(DrawnTestSpec):
    """Any columns, from memory."""

    kind: Literal["made"] = "made"
    source: Any = Field(exclude=True)

    def open(self) -> MadeSource:
        """See DataSpec."""
        return self.source


def columns(stored: Mapping[str, StoredColumn], rows: Mapping[str, Layout], *, part_rows: int = 100, **fields):
    """Rows of any columns."""
    return MadeSpec(source=MadeSource(stored, rows, part_rows), **fields)


NUM_WORDS = 50
# a row's elements say which row it is of, and which of it they are
RAGGED = {
    "input": StoredColumn(column=Tokens(size=NUM_WORDS)),
    "target": labels(("odd", "even")),
    "steps": StoredColumn(column=Sequence(width=2)),
    "marks": StoredColumn(column=Labels(size=3)),
    "tree": StoredColumn(column=Tree(size=NUM_WORDS)),
}


def trees(sizes: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The fields of trees of these many leaves, so of 2 * leaves - 1 nodes: leaves joined in any order."""
    words, children, level = [], [], []
    for leaves in sizes.tolist():
        loose = list(range(leaves))
        words += generator.integers(0, NUM_WORDS, leaves).tolist() + [-1] * (leaves - 1)
        children += [(-1, -1)] * leaves
        heights = [0] * leaves
        for node in range(leaves, 2 * leaves - 1):
            left, right = (loose.pop(int(generator.integers(len(loose)))) for _ in range(2))
            children.append((left, right))
            heights.append(1 + max(heights[left], heights[right]))
            loose.append(node)
        level += heights
    return {
        "words": np.array(words, np.int32),
        "children": np.array(children, np.int32).reshape(-1, 2),
        "level": np.array(level, np.int32),
    }


def ragged(rows: int, *, seed: int = 0, **fields) -> MadeSpec:
    """Rows of every kind whose rows differ in length."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 7, rows)
    leaves = generator.integers(1, 6, rows)
    of_row = np.repeat(np.arange(rows), lengths)
    found: dict[str, Layout] = {
        "input": Ragged.of({"values": (of_row % NUM_WORDS).astype(np.int32)}, lengths),
        "target": Dense(np.arange(rows) % 2),
        "steps": Ragged.of({"values": generator.normal(3, 2, (lengths.sum(), 2)).astype(np.float32)}, lengths),
        "marks": Ragged.of({"values": generator.integers(0, 3, lengths.sum()).astype(np.int32)}, lengths),
        "tree": Ragged.of(trees(leaves, generator), 2 * leaves - 1),
    }
    return columns(RAGGED, found, **fields)


def source_rows(spec: ParquetSpec) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) as they stand in the files, read without any of manta's code."""
    table = pq.read_table(spec.path)
    inputs = np.array(table["x"].to_pylist(), np.float32 if spec.image_shape is None else np.uint8)
    return inputs.reshape(len(inputs), *(spec.image_shape or inputs.shape[1:])), np.array(table["y"].to_pylist())


def number_of(inputs: np.ndarray) -> np.ndarray:
    """The numbers in the file of these rows (as stored)."""
    if inputs.ndim == 2:
        return inputs[:, 0].astype(int)
    flat = inputs.reshape(len(inputs), -1).astype(int)
    return flat[:, 0] * 256 + flat[:, 1]


def written(spec: ParquetSpec, folder: Path) -> DataSet:
    """The spec prepared into a folder of its own."""
    prepare(spec, Folder(folder))
    return DataSet(Folder(folder))


def split_rows(data: DataSet, split: str):
    """All rows of a split as arrays."""
    return table_rows(data.table(split), data.manifest)


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _parquet(folder: Path, columns: dict[str, pa.Array], *, row_group_size: int = 100, **fields) -> ParquetSpec:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=row_group_size)
    return ParquetSpec(path=str(folder / "rows.parquet"), input="x", target="y", **fields)
