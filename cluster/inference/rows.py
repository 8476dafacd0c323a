"""Rows that a trained model is used on: of its own data, of another data set, or of a user's files; part by part."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cluster.data.layouts import Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.prepare import cache_key, prepared
from cluster.data.rows import Rows
from cluster.data.shards import DataSet
from cluster.data.sources.base import DataSpec, Part, Source
from cluster.data.sources.series import WindowsSpec
from cluster.data.tabular import found_files
from cluster.runs.given_files import USUAL, GivenFiles, part_rows
from cluster.runs.given_tables import INPUT, TARGET, Piece
from cluster.runs.predictor import OpenedModel
from nn_models.columns import Label
from nn_models.errors import UserError

WHERE = "DATA"  # as the command line calls it


class PartedRows(Protocol):
    """Rows in parts, each of which can be read on its own; it can be pickled."""

    @property
    def parts(self) -> Sequence[Part]:
        """All rows, in order; of standard input nobody knows how many there are."""

    @property
    def labelled(self) -> bool:
        """Whether rows have what is to be predicted of them."""

    @property
    def fingerprint(self) -> str:
        """Changes when the rows do."""

    def read(self, part: Part) -> Iterator[Piece]:
        """The part's rows, in pieces. Raises UserError for rows that cannot be used."""


@dataclass(frozen=True)
class RowsUsed:
    """The rows; `classes` that a row may be of, () where nothing is known of any; whether rows have labels by name."""

    rows: PartedRows
    classes: tuple[str, ...] = ()
    labelled: bool = False

    @property
    def pieces(self) -> Iterator[Piece]:
        """All rows, never more than a piece of them in memory."""
        return (piece for part in self.rows.parts for piece in self.rows.read(part))


def rows_of(
    model: OpenedModel,
    data: DataSpec | str | Sequence[str] | None,
    *,
    splits: Sequence[str] = (),
    label: str | None = None,
    labelled: bool = True,
    resize: bool = False,
    columns: Sequence[str] = (INPUT,),
) -> RowsUsed:
    """The rows to use a model on, never more than a piece of them in memory.

    `data` is None for the data of the run, a data section, or the names of files (see GivenFiles): with the columns of
    the run's own data, and the labels in its column, or in that called `label`. Of data that is prepared with its
    splits these `splits` are taken, or all; of a source all rows, in its order. `columns` are those that are wanted
    beside labels; without `labelled` there are none. Images of another size are resized where the run's data is, or
    with `resize`. Raises UserError for rows that do not fit.
    """
    own = model.recipe.data
    if isinstance(data, str) and isinstance(own, WindowsSpec) and not os.path.isdir(data):
        if label is not None:
            raise UserError("--label", "what follows a window is its label", "leave it out")
        if splits:
            raise UserError("--split", "files have no splits", "leave it out")
        found = [(name, info.size, info.mtime_ns) for name, info in found_files(data, field=WHERE)]
        key = hashlib.sha256(repr(found).encode()).hexdigest()
        return _of_source(model, own.over(data, field=WHERE), data, columns, labelled, key=key)
    if data is not None and not isinstance(data, DataSpec):
        if splits:
            raise UserError("--split", "files have no splits", "leave it out")
        return _of_files(model, [data] if isinstance(data, str) else data, label, labelled, resize, columns)
    if label is not None:
        raise UserError("--label", "only a file of rows has columns to choose from", "leave it out")
    source = own if data is None else data.fitted_to(model.manifest)
    if data is None or source.prepared_at:
        return _of_splits(model, prepared(source), source, splits, columns, labelled)
    if splits:
        raise UserError("--split", f"{source.kind} is taken as a whole", "leave it out, or prepare the data first")
    return _of_source(model, source.open(), source.kind, columns, labelled, key=cache_key(source))


@dataclass(frozen=True)
class SplitRows:
    """Rows of splits of a prepared data set; parts are stretches of a split, or whole ones where rows are windows."""

    data: DataSet
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    names: tuple[str, ...]  # of classes
    labelled: bool

    @cached_property
    def parts(self) -> Sequence[Part]:
        """See PartedRows."""
        manifest = self.data.manifest
        most = part_rows(manifest.columns)
        found = []
        for split in self.splits:
            rows = manifest.rows(split)
            step = rows if manifest.order == "streams" else most
            for first in range(0, rows, max(step, 1)):
                end = min(first + step, rows)
                found.append(Part(end - first, (split, first, end), f"{split} of {self.data.folder}"))
        return tuple(found)

    @property
    def fingerprint(self) -> str:
        """See PartedRows."""
        checksums = [shard.sha256 for split in self.splits for shard in self.data.shards(split)]
        return hashlib.sha256(repr((self.splits, checksums)).encode()).hexdigest()

    def read(self, part: Part) -> Iterator[Piece]:
        """See PartedRows."""
        split, first, end = part.what
        locations = self.data.row_group_locations(split)
        ends = [*accumulate(self.data.manifest.row_groups(split))]
        low, high = bisect_right(ends, first), bisect_right(ends, end - 1)
        before = ends[low - 1] if low else 0
        rows = self.data.read_row_groups(locations[low : high + 1])
        yield self._piece(rows.at(slice(first - before, end - before)), split)

    def _piece(self, rows: Rows, split: str) -> Piece:
        return _piece(rows.ids, rows.columns, self.columns, self.names if self.labelled else (), split, self.labelled)


@dataclass(frozen=True)
class SourceRows:
    """All rows of a source that is open."""

    source: Source
    key: str
    columns: tuple[str, ...]
    names: tuple[str, ...]  # of classes
    labelled: bool
    whole: bool  # rows are windows of one text: a pool is one part

    @cached_property
    def parts(self) -> Sequence[Part]:
        """See PartedRows."""
        found = []
        for pool, parts in self.source.pools.items():
            ends = [*accumulate(part.rows for part in parts)]
            for end, part in zip(ends, parts, strict=True):
                if not self.whole:
                    found.append(Part(part.rows, (pool, end - part.rows, (part,)), part.name))
            if self.whole and parts:
                found.append(Part(ends[-1], (pool, 0, tuple(parts)), parts[0].name))
        return tuple(found)

    @property
    def fingerprint(self) -> str:
        """See PartedRows."""
        return self.key

    def read(self, part: Part) -> Iterator[Piece]:
        """See PartedRows."""
        pool, first, parts = part.what
        several = sum(bool(parts) for parts in self.source.pools.values()) > 1
        names = self.names if self.labelled else ()
        for one in parts:
            ids, rows = np.arange(first, first + one.rows), self.source.load(one)
            yield _piece(ids, rows, self.columns, names, pool if several else None, self.labelled)
            first += one.rows


def _of_splits(
    model: OpenedModel, data: DataSet, spec: DataSpec, splits: Sequence[str], columns: Sequence[str], labelled: bool
) -> RowsUsed:
    manifest = data.manifest
    for split in splits:
        if not manifest.rows(split):
            raise UserError("--split", f"{spec.kind} has no rows in {split}; it has {', '.join(manifest.splits)}")
    names = _checked(model, manifest.columns, spec.kind, columns)
    found = tuple(splits) or tuple(split for split in manifest.splits if manifest.rows(split))
    rows = SplitRows(data, found, tuple(columns), names, labelled and _has_all(model, manifest.columns))
    return RowsUsed(rows, names, labelled and bool(names))


def _of_source(
    model: OpenedModel, source: Source, kind: str, columns: Sequence[str], labelled: bool, *, key: str = ""
) -> RowsUsed:
    names = _checked(model, source.columns, kind, columns)
    whole, has = model.manifest.order == "streams", labelled and _has_all(model, source.columns)
    rows = SourceRows(source, key, tuple(columns), names, has, whole)
    return RowsUsed(rows, names, labelled and bool(names))


def _of_files(
    model: OpenedModel, paths: Sequence[str], label: str | None, labelled: bool, resize: bool, columns: Sequence[str]
) -> RowsUsed:
    manifest, recipe = model.manifest.columns, model.recipe
    wanted = recipe.data.file_columns or USUAL
    wanted = wanted._replace(resize=wanted.resize or resize)
    read = {name: manifest[name] for name in columns if name in manifest}
    # a column of numbers to predict has no classes, which are all that is asked for beside what is read
    if TARGET in manifest and (TARGET in columns or isinstance(manifest[TARGET].column, Label)):
        read[TARGET] = manifest[TARGET]
    sentences = "tree" in recipe.model.gives  # whose trees nobody knows
    files = GivenFiles(
        paths,
        read,
        wanted,
        label=label,
        labelled=labelled and not sentences and (TARGET in read or label is not None),
        sentences=sentences,
        path=WHERE,
    )
    return RowsUsed(files, labelled=files.labelled)


def _has_all(model: OpenedModel, columns: Mapping[str, StoredColumn]) -> bool:
    """Whether rows have all that the objective compares with."""
    return set(model.recipe.objective.reads) <= set(columns)


def _checked(
    model: OpenedModel, theirs: Mapping[str, StoredColumn], source: str, columns: Sequence[str]
) -> tuple[str, ...]:
    """The names of the classes. Raises UserError where the rows are not such as the model was trained on."""
    for name in (INPUT, *(name for name in columns if name not in (INPUT, TARGET))):
        ours = model.manifest.columns[name]
        if name not in theirs:
            raise UserError(WHERE, f"the rows of {source} have no {name}, which the model reads", "choose others")
        have, want = (f"{stored.column.describe()} {stored.dtype}" for stored in (theirs[name], ours))
        if have != want:
            raise UserError(
                WHERE, f"the rows of {source} are {have}, but the model was trained on {want}", "choose others"
            )
        if (known := getattr(ours.column, "names", ())) != (found := getattr(theirs[name].column, "names", ())):
            few, some = (", ".join(names[:5]) for names in (found, known))
            what = f"the names in {name} of {source} ({few}, …) are not those of the model ({some}, …)"
            raise UserError(WHERE, what, "choose others")
    target = theirs.get(TARGET)
    names: tuple[str, ...] = getattr(target.column, "names", ()) if target else ()
    return names


def _piece(
    ids: Any,
    rows: Mapping[str, Layout],
    columns: Sequence[str],
    names: tuple[str, ...],
    split: str | None,
    labelled: bool,
) -> Piece:
    targets, labels = rows.get(TARGET), None
    if names and isinstance(targets, Dense) and targets.values.ndim == 1:
        labels = np.array(names, np.object_)[targets.values.astype(np.int64)]
    kept = {name: rows[name] for name in columns if name in rows and (name != TARGET or labelled)}
    return Piece(ids, kept, labels, split)


def told(model: OpenedModel, names: Sequence[str], piece: Piece) -> dict[str, Any]:
    """The columns of these names, which a net is told of beside the rows: their labels."""
    if not names:
        return {}
    if piece.labels is None:
        raise UserError(WHERE, f"rows without labels, which {model.recipe.model.kind} is told", "give labelled rows")
    return dict.fromkeys(names, piece.labels.astype(str))


def which(piece: Piece) -> dict[str, pa.Array]:
    """Which rows they are: columns split, row, file and label, where there are such."""
    rows = len(piece)
    found: dict[str, pa.Array] = {} if piece.split is None else {"split": pa.repeat(pa.scalar(piece.split), rows)}
    found["row"] = pa.array(piece.ids, pa.int64())
    if piece.files is not None:
        found["file"] = pa.array(piece.files, pa.string())
    if piece.labels is not None:
        found["label"] = pa.array(piece.labels, pa.string())
    return found
