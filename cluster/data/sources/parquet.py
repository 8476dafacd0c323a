"""parquet: the user's own columns of Parquet files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pydantic import Field, model_validator

from cluster.data.layouts import Array, Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import UNLABELLED, DataSpec, DrawnTestSpec, FileColumns, Part, absolute
from cluster.data.sources.columns import (
    LabelColumn,
    NumberColumn,
    Reader,
    Shape,
    are_numbers,
    array_columns,
    holds_fractions,
    label_texts,
    number_column,
)
from cluster.data.sources.precision import check_precision
from cluster.data.split import Traits
from cluster.data.tables import UnreadableError
from cluster.data.tabular import PARQUET, check_named, check_plain, found_files, open_parquet, read_parquet
from nn_models.columns import Column, Label, Numbers
from nn_models.errors import UserError
from nn_models.spec import invalid

TargetKind = Literal["label", "number"]
Group = Annotated[
    str | None,
    Field(min_length=1, description="a column, such as the patient: rows with the same value stay in one split"),
]


@dataclass(frozen=True)
class ParquetColumns:
    """Parts are (file, row group); each reader gives one column of a data set."""

    readers: Mapping[str, Reader]
    pools: dict[str, list[Part]]
    group: str | None = None  # the column that says which rows belong together

    @property
    def columns(self) -> dict[str, StoredColumn]:
        """See Source."""
        return {name: reader.stored for name, reader in self.readers.items()}

    def load(self, part: Part) -> dict[str, Layout]:
        """See Source."""
        file, group = part.what
        table = read_parquet(file, [name for reader in self.readers.values() for name in reader.names], group)
        where = _where(file, group)
        for name in table.column_names:
            if table[name].null_count:
                raise UserError(where, f"column {name} has {table[name].null_count} empty values", "fill or drop them")
        return {name: Dense(reader.read(table, where)) for name, reader in self.readers.items()}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        target = self.readers.get("target")
        labels = target if isinstance(target, LabelColumn) else None
        names = [*(labels.names if labels else ()), *([self.group] if self.group else ())]
        file, group = part.what
        table, where = read_parquet(file, names, group), f"{file}, row group {group}"
        if labels is not None and not labels.name:  # one class for all
            labels = None
        return Traits(
            None if labels is None else labels.read(table, where),
            None if self.group is None else group_names(table[self.group], f"{where}, column {self.group}"),
        )


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
                file = open_parquet(name)
                for column in columns:
                    check_named(name, column, file.schema.names)
                    check_plain(name, file, column)
                groups = enumerate(file.row_groups)
                pools[pool] += [Part(rows, (name, group), _where(name, group)) for group, rows in groups]
            pools[pool] = [part for part in pools[pool] if part.rows]
            if not pools[pool]:
                base = self.path if pool == "train" else self.test_path
                raise UserError(str(base), "no rows in these Parquet files", "give files with data")
        return pools

    def _found(self) -> dict[str, list[tuple[str, fs.FileInfo]]]:
        """Pool -> its files as they are there now."""
        found = {"train": found_files(self.path, field="data.path", endings=PARQUET)}
        if self.test_path:
            found["test"] = found_files(self.test_path, field="data.test_path", endings=PARQUET)
        return found


class ParquetSpec(DrawnTestSpec):
    """Columns of Parquet files: images (encoded bytes, or fixed-size lists of 0 to 255) or numeric features."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1, description="a Parquet file or a folder of them, local or a URI")
    test_path: str | None = Field(None, description="the test split, where it stands apart")
    input: str | tuple[str, ...] = Field(description="the column with the input, or several numeric columns")
    target: str | None = Field(
        None, description="the column with the label or number to predict; without it all rows are of one class"
    )
    target_kind: TargetKind | None = Field(None, description="label or number; numbers for float columns by default")
    image_shape: Shape | None = Field(
        None, description="(channels, height, width) of images; needed for lists, and to resize encoded images"
    )
    group: Group = None

    @property
    def _files(self) -> "ParquetFiles":
        return ParquetFiles(self.path, self.test_path)

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update=self._files.resolved(base))

    def fingerprint(self) -> str:
        """See DataSpec."""
        return self._files.fingerprint()

    @property
    def file_columns(self) -> FileColumns:
        """See DataSpec."""
        return FileColumns(self._inputs, self.target, self.image_shape is not None)

    def open(self) -> ParquetColumns:
        """See DataSpec. Reads the files' schemas, and the target column for the names of the classes."""
        if not self._inputs:
            raise UserError("data.input", "names no column", "give at least one")
        wanted = [*self._inputs, *([self.target] if self.target else [])]
        pools = self._files.parts((*wanted, *([self.group] if self.group else [])))
        name, first = first_row(pools["train"], wanted)
        array = array_columns(first, name, self._inputs, image_shape=self.image_shape)
        target = (
            self._target(self.target, pools["train"], name, first) if self.target else LabelColumn(None, UNLABELLED)
        )
        numbers = [*array.names, *(target.names if isinstance(target, NumberColumn) else ())]
        groups: dict[str, list[int]] = {}
        for part in pools["train"]:
            groups.setdefault(part.what[0], []).append(part.what[1])
        check_precision(groups, numbers)
        return ParquetColumns({"input": array, "target": target}, pools, self.group)

    def _target(self, target: str, parts: Sequence[Part], name: str, first: pa.Table) -> LabelColumn | NumberColumn:
        kind = self.target_kind or ("number" if holds_fractions(first[target]) else "label")
        if kind == "number":
            return number_column(first, name, target)
        names = class_names(parts, target, or_numbers=True)
        if len(names) < 2:
            raise UserError(self.path, f"column {target} holds {len(names)} class; at least two are needed")
        return LabelColumn(target, names, or_numbers=True)

    def target_fix(self, kinds: tuple[type[Column], ...]) -> tuple[str, str] | None:
        """See DataSpec. Looks at what the column holds: whole numbers may be both, fractions and text may not."""
        if self.target is None:
            return "data.target", "name the column to predict in data.target"
        parts = self._files.parts([self.target])["train"]
        try:
            if Label in kinds:
                class_names(parts, self.target, or_numbers=False)
                return "data.target_kind", "set data.target_kind to label"
            if Numbers in kinds and are_numbers(first_row(parts, [self.target])[1][self.target]):
                return "data.target_kind", "set data.target_kind to number"
        except UserError:  # what it holds are no labels
            pass
        return None

    @property
    def _inputs(self) -> tuple[str, ...]:
        return (self.input,) if isinstance(self.input, str) else self.input

    @model_validator(mode="after")
    def _columns_go_together(self) -> Self:
        check_target(self.target, self._inputs)
        if self.target_kind and not self.target:
            raise invalid("there is no target", "name the column in target", field="target_kind")
        return self


def check_target(target: str | None, inputs: Sequence[str]) -> None:
    """Refuse a section that would have a model read what it is to predict."""
    if target in inputs:
        raise invalid(
            f"{target} is an input too, so there would be nothing to predict", "name another column", field="target"
        )


def _where(file: str, group: int) -> str:
    return f"{file}, row group {group}"


def group_names(column: pa.ChunkedArray, where: str) -> Array:
    """Whom the rows belong to, as texts."""
    if column.null_count:
        raise UserError(where, f"{column.null_count} empty values", "say whom each row belongs to, or drop such rows")
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind):
        raise UserError(where, f"values of type {kind} name no groups", "choose a column of texts or numbers")
    return np.array(column.cast(kind).cast(pa.string()).to_pylist(), np.object_)


def first_row(parts: Sequence[Part], columns: Sequence[str]) -> tuple[str, pa.Table]:
    """The first file's name, and these columns of its first row. Raises UserError where one of them is empty."""
    name, _ = parts[0].what
    file = open_parquet(name)
    try:
        first = file.first_row(columns)
    except UnreadableError as error:
        raise UserError(name, f"damaged Parquet file ({error})", "replace or remove it") from None
    for column in first.column_names:
        if first[column].null_count:
            raise UserError(f"{name}, row 0", f"column {column} has an empty value", "fill or drop such rows")
    return name, first


def class_names(parts: Sequence[Part], target: str, *, or_numbers: bool) -> tuple[str, ...]:
    """The names of the classes in these files: whole numbers in their order, others in the alphabet's.

    `or_numbers`: the target might be a number as well, which is what a column of no labels is told.
    """
    names: set[str] = set()
    numeric = True
    for file in dict.fromkeys(part.what[0] for part in parts):
        column = read_parquet(file, [target])[target]
        if column.null_count:
            raise UserError(file, f"column {target} has {column.null_count} empty values", "fill or drop them")
        numeric &= pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        names.update(label_texts(column, f"{file}, column {target}", or_numbers=or_numbers).unique().to_pylist())
    return tuple(sorted(names, key=int) if numeric else sorted(names))
