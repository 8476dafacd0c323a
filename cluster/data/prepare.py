"""Prepare: a source becomes shards and a manifest, once, in the cache or where the user says."""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cluster.data.cache import cache_root, publish
from cluster.data.layouts import Array, Dense, Layout, Ragged
from cluster.data.manifest import MANIFEST, SPLITS, Manifest, Shard, StoredColumn
from cluster.data.rows import Rows
from cluster.data.shards import DataSet, write_shard
from cluster.data.sources.base import BadRows, DataSpec, Part, Source, SplitSpec, bad_rows
from cluster.data.split import TEST, TRAIN, VALIDATION, Traits, drawn
from cluster.runtime.limits import machine_bytes, size
from cluster.storage import Folder, failure
from nn_models.columns import Column, Label
from nn_models.errors import Problem, UserError, did_you_mean

logger = logging.getLogger(__name__)

FORMAT = 2  # part of the cache's key: raise it when prepared data changes its meaning
STORED_SMALLER = 50  # times that compressed rows may take less than in memory: more is refused before it is tried
BLOCK_NUMBERS = 1 << 20  # that are in memory as float64 at once


@dataclass(frozen=True)
class Slot:
    """Where the rows of one part go: for each of them the split (index into SPLITS) and the row id inside it."""

    index: int
    part: Part
    splits: NDArray[np.uint8]
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Moments:
    """Of some numbers: how many there are, their mean, their squared distances from it."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]


@dataclass(frozen=True)
class Converted:
    """What one part became: its shards, and what the statistics need of its training rows' columns."""

    shards: dict[str, Shard]
    moments: Mapping[str, Moments]  # of the columns that have mean and std
    elements: Mapping[str, int]  # of those whose rows differ in length
    classes: Mapping[str, Mapping[str, NDArray[np.int64]]]  # of the labels: rows of each class in each split
    unknown: Mapping[str, Mapping[str, tuple[int, int]]]  # of words: those not in the vocabulary, and all, in each
    problems: tuple[Problem, ...] = ()  # of rows that cannot be used: then there is nothing else


# Applies a function to every slot, in any order of work, keeping the order of results.
Mapper = Callable[[Callable[[Slot], Converted], Sequence[Slot]], Iterable[Converted]]


def prepared(spec: DataSpec) -> DataSet:
    """The spec's data set from the cache, prepared first where it is not there yet; logged is what it does not know.

    Raises UserError where the data is missing or damaged.
    """
    data = DataSet(spec.prepared_at) if spec.prepared_at else _cached(spec)
    for line in data.manifest.unknown_tokens():
        logger.info("data: %s", line)
    return data


def _cached(spec: DataSpec) -> DataSet:
    folder = cache_root() / "data" / f"{spec.kind}-{cache_key(spec)}"
    if not (folder / MANIFEST).exists():
        unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            prepare(spec, Folder(unfinished))
            publish(unfinished, folder)
        except OSError as error:
            raise failure(str(folder), "written", error) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return DataSet(Folder(folder))


def cache_key(spec: DataSpec) -> str:
    """Differs when the source, the split or the content differs."""
    identity = json.dumps([FORMAT, spec.identity(), spec.fingerprint()], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def prepare(spec: DataSpec, out: Folder, *, mapper: Mapper = map) -> Manifest:
    """Write the spec's rows as shards into `out`; the manifest comes last, so half a data set is none.

    `mapper` converts parts elsewhere (Ray Data for large sources). Raises UserError for bad content.
    """
    if spec.prepared_at:
        raise UserError("data.kind", f"{spec.kind} is prepared already", "prepare another source")
    source = spec.open()
    out.create()
    if out.names():
        raise UserError(str(out), "not empty", "choose a new folder, or delete this one")
    _refuse_more_than_there_is(source, out)
    slots = _deal(source, cast(SplitSpec, spec))  # every source is split here
    source = spec.learned(source, [(slot.part, slot.splits == TRAIN) for slot in slots])
    converted = list(mapper(partial(convert, source, out), slots))
    if problems := [problem for part in converted for problem in part.problems]:
        raise bad_rows(problems)
    manifest = Manifest(
        version=2,
        source=spec.kind,
        order=spec.order,
        columns={name: _with_statistics(name, stored, converted) for name, stored in source.columns.items()},
        splits={
            split: tuple(part.shards[split] for part in converted if split in part.shards)
            for split in SPLITS
            if any(split in part.shards for part in converted)
        },
    )
    out.write_text(MANIFEST, json.dumps(manifest.content(), indent=1, ensure_ascii=False))
    return manifest


def _refuse_more_than_there_is(source: Source, out: Folder) -> None:
    """Raise UserError where rows of such a size cannot be converted here, or not be stored."""
    row_bytes = sum(stored.row_bytes for stored in source.columns.values())
    parts = [part.rows for parts in source.pools.values() for part in parts]
    part, rows, memory = max(parts, default=0), sum(parts), machine_bytes()
    each = f"rows of {size(row_bytes)} each"
    fix = "make rows smaller, such as by data.image_size"
    if part * row_bytes > memory:
        raise UserError("data", f"{part:,} {each} are converted at once, and there are {size(memory)} of memory", fix)
    if out.local and rows * row_bytes > STORED_SMALLER * (free := shutil.disk_usage(out.local).free):
        raise UserError("data", f"{rows:,} {each} do not fit into {out}, which has {size(free)} left", fix)


def _deal(source: Source, spec: SplitSpec) -> list[Slot]:
    """Decide for every row which split it belongs to, and its id there."""
    slots: list[Slot] = []
    taken = np.zeros(len(SPLITS), np.int64)
    anomalous = _anomalous(source, spec)
    for pool, parts in source.pools.items():
        num_rows = sum(part.rows for part in parts)
        splits = np.full(num_rows, SPLITS.index(pool), np.uint8)
        if pool == "train":
            splits = _splits(source, parts, spec, anomalous)
        elif anomalous:
            splits[_of_classes(Traits.joined([source.traits(part) for part in parts]), anomalous)] = TEST
        ids = np.empty(num_rows, np.int64)
        for split in range(len(SPLITS)):
            chosen = splits == split
            ids[chosen] = taken[split] + np.arange(chosen.sum())
            taken[split] += chosen.sum()
        first = 0
        for part in parts:
            here = slice(first, first + part.rows)
            slots.append(Slot(len(slots), part, splits[here], ids[here]))
            first += part.rows
    return slots


def _anomalous(source: Source, spec: SplitSpec) -> list[int]:
    """The numbers of the classes whose rows are only to be tested on."""
    if not (anomaly := getattr(spec, "anomaly", ())):
        return []
    names = getattr(source.columns["target"].column, "names", ()) if "target" in source.columns else ()
    if spec.order == "streams" or len(names) < 2:
        raise UserError("data.anomaly", f"rows of {spec.kind} have no classes", "leave it out, or choose other data")
    for name in anomaly:
        if name not in names:
            raise UserError("data.anomaly", f"{name!r} is no class of {spec.kind}", did_you_mean(name, names))
    return [names.index(name) for name in anomaly]


def _of_classes(traits: Traits, classes: Sequence[int]) -> NDArray[np.bool_]:
    """(rows,): whether a row is of one of these classes, or belongs to the same group as one that is."""
    assert traits.labels is not None  # the classes have names
    found: NDArray[np.bool_] = np.isin(traits.labels, classes)
    return found if traits.groups is None else np.isin(traits.groups, traits.groups[found])


def _splits(source: Source, parts: Sequence[Part], spec: SplitSpec, anomalous: Sequence[int] = ()) -> NDArray[np.uint8]:
    """The split of each row of the parts that have to be split."""
    traits: Traits | None = None
    num_rows = sum(part.rows for part in parts)
    normal = np.full(num_rows, True)
    if anomalous:
        traits = Traits.joined([source.traits(part) for part in parts])
        normal = ~_of_classes(traits, anomalous)
        traits = Traits(*(None if values is None else values[normal] for values in traits))
        num_rows = int(normal.sum())
    num_test = 0 if "test" in source.pools else round(num_rows * spec.held_out_for_test)
    num_validation = 0 if "validation" in source.pools else round(num_rows * spec.validation_fraction)
    if num_test + num_validation >= num_rows:
        raise UserError(
            "data",
            f"of {num_rows} rows none is left to train on, with {num_validation} for validation and {num_test} for "
            "test",
            "lower validation_fraction or test_fraction, or add rows",
        )
    if spec.order == "streams":  # what is held out is the end of the text
        splits = np.full(num_rows, TRAIN)
        splits[num_rows - num_test - num_validation :] = VALIDATION
        splits[num_rows - num_test :] = TEST
        return splits
    if traits is None:
        traits = Traits.joined([source.traits(part) for part in parts])
    if not spec.stratify:
        traits = traits._replace(labels=None)
    splits = drawn(num_rows, traits, seed=spec.split_seed, num_test=num_test, num_validation=num_validation)
    if traits.groups is not None:
        _check_groups(traits.groups, splits, {"test": num_test, "validation": num_validation})
        for pool in ("validation", "test"):
            apart = [source.traits(part).groups for part in source.pools.get(pool, ())]
            if both := set(traits.groups) & {name for part in apart if part is not None for name in part}:
                raise UserError(
                    "data.group",
                    f"{len(both)} groups have rows in the {pool} split's own files and in the others, such as "
                    f"{min(both)!r}",
                    "take their rows out of one of them",
                )
    found = np.full(len(normal), TEST)
    found[normal] = splits
    return found


def _check_groups(groups: Array, splits: NDArray[np.uint8], wanted: Mapping[str, int]) -> None:
    """Refuse a split that got no group at all."""
    for split, num_rows in {**wanted, "train": 1}.items():
        if num_rows and not (splits == SPLITS.index(split)).any():
            fractions = {"test": "test_fraction", "validation": "validation_fraction"}
            raise UserError(
                "data.group",
                f"{len(set(groups))} groups, of which none fits into the {split} split",
                f"choose a column of more groups, or change {fractions.get(split, ' or '.join(fractions.values()))}",
            )


def convert(source: Source, out: Folder, slot: Slot) -> Converted:
    """Load one part and write a shard for each split that it has rows of."""
    columns = source.columns
    try:
        loaded = source.load(slot.part)
        _check_lengths(loaded, columns, slot.part.name or f"data, part {slot.index}")
    except BadRows as error:
        return Converted({}, {}, {}, {}, {}, error.problems)
    rows = Rows(slot.ids, {name: loaded[name] for name in columns})
    parts = {split: rows.at(slot.splits == index) for index, split in enumerate(SPLITS)}
    shards = {
        split: write_shard(out, f"{split}-{slot.index:05d}.parquet", part, columns)
        for split, part in parts.items()
        if len(part.ids)
    }
    train = parts["train"].columns
    return Converted(
        shards,
        moments={name: _moments(_numbers(train[name])) for name, stored in columns.items() if stored.measured},
        elements={name: int(layout.lengths.sum()) for name, layout in train.items() if layout.lengths is not None},
        classes={
            name: {split: _counts(part.columns[name], stored.column.size) for split, part in parts.items()}
            for name, stored in columns.items()
            if isinstance(stored.column, Label)
        },
        unknown={
            name: {split: _unknown(part.columns[name], stored.column) for split, part in parts.items()}
            for name, stored in columns.items()
            if stored.column.unknown_words(np.empty(0, np.int32)) is not None
        },
    )


def _counts(labels: Layout, num_classes: int) -> NDArray[np.int64]:
    """Rows of each class."""
    return np.bincount(_numbers(labels), minlength=num_classes)


def _unknown(layout: Layout, column: Column) -> tuple[int, int]:
    """Words that are not in the vocabulary, and all of them; nodes of trees without a word do not count."""
    stored = layout.fields["words"] if isinstance(layout, Ragged) and "words" in layout.fields else _numbers(layout)
    words = np.asarray(stored, np.int64)
    words = words[words >= 0]
    unknown = column.unknown_words(words)
    return 0 if unknown is None else int(unknown.sum()), words.size


def _check_lengths(loaded: Mapping[str, Layout], columns: Mapping[str, StoredColumn], where: str) -> None:
    """Raise BadRows for rows without an element, and for labels of elements that are not as many as the elements."""
    problems = []
    for name, stored in columns.items():
        lengths = _lengths(loaded[name])
        for row in np.flatnonzero(lengths == 0):
            problems.append(Problem(f"{where}, row {row}", f"its {name} has no element", "drop the row, or mend it"))
        if (of := stored.column.labels_of) is None:
            continue
        labelled = _lengths(loaded[of])
        for row in np.flatnonzero(lengths != labelled):
            message = f"{lengths[row]} labels in {name} for {labelled[row]} elements of {of}"
            problems.append(Problem(f"{where}, row {row}", message, "label each element once, or drop the row"))
    if problems:
        raise BadRows.of(problems)


def _lengths(layout: Layout) -> NDArray[np.int32]:
    """(rows,): elements of each row; where all rows are of one shape, their first dimension."""
    if layout.lengths is not None:
        return layout.lengths
    assert isinstance(layout, Dense)
    return np.full(len(layout), layout.values.shape[1] if layout.values.ndim > 1 else 1, np.int32)


def _numbers(layout: Layout) -> Array:
    """The numbers of rows, or of their elements: (rows or elements, ...)."""
    if isinstance(layout, Ragged):
        (values,) = layout.fields.values()
        return values
    assert isinstance(layout, Dense)
    return layout.values


def _moments(numbers: Array) -> Moments:
    """By channel for images (rows, channels, height, width), by place in the last dimension otherwise."""
    if numbers.ndim == 4:
        values = np.moveaxis(numbers, 1, 0).reshape(numbers.shape[1], -1)
    else:
        values = numbers.reshape(-1, numbers.shape[-1]).T
    count = values.shape[1]
    if not count:
        return Moments(0, np.zeros(len(values)), np.zeros(len(values)))
    mean = values.mean(1, dtype=np.float64)
    blocks = np.array_split(values, 1 + values.size // BLOCK_NUMBERS, axis=1)
    squares = np.sum([np.square(block - mean[:, None]).sum(1) for block in blocks], axis=0)
    return Moments(count, mean, squares)


def _with_statistics(name: str, stored: StoredColumn, converted: Sequence[Converted]) -> StoredColumn:
    """The column with what is measured of its training rows."""
    found: dict[str, Any] = {}
    if stored.measured:
        found |= _mean_and_std(name, [part.moments[name] for part in converted], stored.unit)
    if stored.column.layout == "ragged":
        num_rows = sum(part.shards["train"].rows for part in converted if "train" in part.shards)
        found["elements"] = sum(part.elements[name] for part in converted) / num_rows
    if isinstance(stored.column, Label):
        counts = {split: np.sum([part.classes[name][split] for part in converted], axis=0) for split in SPLITS}
        counts = {split: tuple(number.tolist()) for split, number in counts.items() if number.any()}
        found["column"] = stored.column.model_copy(update={"counts": counts})
    if any(name in part.unknown for part in converted):
        sums = {split: np.sum([part.unknown[name][split] for part in converted], axis=0).tolist() for split in SPLITS}
        unknown = {split: tuple(counted) for split, counted in sums.items() if counted[1]}
        found["column"] = stored.column.model_copy(update={"unknown": unknown})
    return stored.model_copy(update=found)


def _mean_and_std(name: str, parts: Sequence[Moments], unit: float) -> dict[str, tuple[float, ...]]:
    """Over all parts (Chan, Golub & LeVeque 1983, eq. 2.1: no difference of large numbers); `unit` counts as 1."""
    count = sum(part.count for part in parts)
    if not count:
        raise UserError("data", f"no training row has an element of its {name}", "add rows that have some")
    mean = np.sum([part.count * part.mean for part in parts], axis=0) / count
    squares = np.sum([part.squares + part.count * np.square(part.mean - mean) for part in parts], axis=0)
    std = np.sqrt(squares / count)
    std[std <= np.maximum(1e-7 * np.abs(mean), 1e-30)] = unit  # constant but for float32's rounding: nothing to scale
    return {"mean": tuple((mean / unit).tolist()), "std": tuple((std / unit).tolist())}
