"""Prepare: a source becomes shards and a manifest, once, in the cache or where the user says."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.data.cache import cache_root
from cluster.data.manifest import MANIFEST, SPLITS, Manifest, Shard
from cluster.data.rows import Rows
from cluster.data.shards import DataSet, write_shard
from cluster.data.sources.base import DataSpec, Part, Source, SplitSpec
from cluster.data.sources.prepared import ShardsSpec
from cluster.storage import Folder
from nn_models.errors import UserError

FORMAT = 1  # part of the cache's key: raise it when prepared data changes its meaning
BLOCK_NUMBERS = 1 << 20  # that are in memory as float64 at once


@dataclass(frozen=True)
class Slot:
    """Where the rows of one part go: for each of them the split (index into SPLITS) and the row id inside it."""

    index: int
    part: Part
    splits: NDArray[np.uint8]
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Converted:
    """What one part became: its shards, and the moments of its training rows for the statistics."""

    shards: dict[str, Shard]
    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]


# Applies a function to every slot, in any order of work, keeping the order of results.
Mapper = Callable[[Callable[[Slot], Converted], Sequence[Slot]], Iterable[Converted]]


def prepared(spec: DataSpec) -> DataSet:
    """The spec's data set from the cache, prepared first where it is not there yet.

    Raises UserError where the data is missing or damaged.
    """
    if isinstance(spec, ShardsSpec):
        return DataSet(spec.path)
    folder = cache_root() / "data" / f"{spec.kind}-{cache_key(spec)}"
    if not (folder / MANIFEST).exists():
        unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            prepare(spec, Folder(unfinished))
            _publish(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return DataSet(Folder(folder))


def cache_key(spec: DataSpec) -> str:
    """Differs when the source, the split or the content differs."""
    identity = json.dumps([FORMAT, spec.identity(), spec.fingerprint()], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _publish(unfinished: Path, folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).exists():  # what is left of a set that somebody deleted
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / MANIFEST).exists():  # another process was not first: this is a real failure
            raise


def prepare(spec: DataSpec, out: Folder, *, mapper: Mapper = map) -> Manifest:
    """Write the spec's rows as shards into `out`; the manifest comes last, so half a data set is none.

    `mapper` converts parts elsewhere (Ray Data for large sources). Raises UserError for bad content.
    """
    if not isinstance(spec, SplitSpec):
        raise UserError("data.kind", f"{spec.kind} is prepared already", "prepare another source")
    source = spec.open()
    out.create()
    if out.names():
        raise UserError(str(out), "not empty", "choose a new folder, or delete this one")
    slots = _deal(source, spec)
    converted = list(mapper(partial(convert, source, out), slots))
    manifest = Manifest(
        source=spec.kind,
        input_shape=source.columns.input_shape,
        input_dtype=source.columns.input_dtype,
        condition_shape=source.columns.condition_shape,
        target_kind=source.columns.target_kind,
        num_outputs=source.columns.num_outputs,
        class_names=source.columns.class_names,
        **_statistics(converted, source.columns.input_dtype),
        splits={
            split: tuple(part.shards[split] for part in converted if split in part.shards)
            for split in SPLITS
            if any(split in part.shards for part in converted)
        },
    )
    # without fields that are None: rows that are no pairs keep the manifest they have always had
    out.write_text(MANIFEST, manifest.model_dump_json(indent=1, exclude_none=True))
    return manifest


def _deal(source: Source, spec: SplitSpec) -> list[Slot]:
    """Decide for every row which split it belongs to, and its id there."""
    slots: list[Slot] = []
    taken = np.zeros(len(SPLITS), np.int64)
    for pool, parts in source.pools.items():
        num_rows = sum(part.rows for part in parts)
        splits = np.full(num_rows, SPLITS.index(pool), np.uint8)
        if pool == "train":
            shuffled = np.random.default_rng([spec.split_seed]).permutation(num_rows)
            num_test = 0 if "test" in source.pools else round(num_rows * spec.held_out_for_test)
            num_validation = round(num_rows * spec.validation_fraction)
            splits[shuffled[:num_test]] = SPLITS.index("test")
            splits[shuffled[num_test : num_test + num_validation]] = SPLITS.index("validation")
            if num_test + num_validation >= num_rows:
                raise UserError(
                    "data",
                    f"of {num_rows} rows none is left to train on, with {num_validation} for validation and "
                    f"{num_test} for test",
                    "lower validation_fraction or test_fraction, or add rows",
                )
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


def convert(source: Source, out: Folder, slot: Slot) -> Converted:
    """Load one part and write a shard for each split that it has rows of."""
    inputs, targets, *condition = source.load(slot.part)
    rows = Rows(slot.ids, inputs, targets, *condition)
    shards: dict[str, Shard] = {}
    train = np.zeros(len(inputs), bool)
    for index, split in enumerate(SPLITS):
        chosen = slot.splits == index
        if chosen.any():
            name = f"{split}-{slot.index:05d}.parquet"
            shards[split] = write_shard(out, name, rows.at(chosen))
        if split == "train":
            train = chosen
    return Converted(shards, *_moments(inputs[train]))


def _moments(inputs: NDArray[Any]) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Numbers counted, their mean, their squared distances from it: by channel for images, by feature otherwise."""
    values = np.moveaxis(inputs, 1, 0).reshape(inputs.shape[1], -1) if inputs.ndim == 4 else inputs.T
    count = values.shape[1]
    if not count:
        return 0, np.zeros(len(values)), np.zeros(len(values))
    mean = values.mean(1, dtype=np.float64)
    blocks = np.array_split(values, 1 + values.size // BLOCK_NUMBERS, axis=1)
    squares = np.sum([np.square(block - mean[:, None]).sum(1) for block in blocks], axis=0)
    return count, mean, squares


def _statistics(converted: Sequence[Converted], dtype: str) -> dict[str, tuple[float, ...]]:
    """Mean and deviation over all parts (Chan, Golub & LeVeque 1983, eq. 2.1: no difference of large numbers)."""
    unit = 255.0 if dtype == "uint8" else 1.0
    count = sum(part.count for part in converted)
    mean = np.sum([part.count * part.mean for part in converted], axis=0) / count
    squares = np.sum([part.squares + part.count * np.square(part.mean - mean) for part in converted], axis=0)
    std = np.sqrt(squares / count)
    std[std <= np.maximum(1e-7 * np.abs(mean), 1e-30)] = unit  # constant but for float32's rounding: nothing to scale
    return {"mean": tuple((mean / unit).tolist()), "std": tuple((std / unit).tolist())}
