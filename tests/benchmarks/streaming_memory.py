"""Streaming: peak memory of an epoch of a set and of one several times as large, whose rows are not held in memory.

A fresh process each streams synthetic images of 28x28 bytes with a window of 8192 rows. `manta` is the larger set's
peak and `other` the smaller one's, in MiB; both contain what Python, torch and pyarrow take before the first row.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from measuring import BATCH, Case, fresh_process, options, publish, scratch

from cluster.data.layouts import Dense
from cluster.data.loader import Reading, StreamedRows
from cluster.data.manifest import MANIFEST, Manifest, Shard, StoredColumn
from cluster.data.order import LaneOrder, training_order
from cluster.data.rows import Rows
from cluster.data.shards import DataSet, write_shard
from cluster.storage import Folder
from nn_models.columns import Image, Label

SHAPE, WINDOW, SHARD_ROWS = (1, 28, 28), 8192, 30_000


def synthetic(folder: Path, rows: int) -> None:
    """Random images as shards: random bytes do not compress, so storage is as large as memory would be."""
    place, generator = Folder(folder).create(), np.random.default_rng(0)
    columns = {
        "input": StoredColumn(column=Image(shape=SHAPE), dtype="uint8", mean=(0.5,), std=(0.29,)),
        "target": StoredColumn(column=Label(size=10), dtype="int64"),
    }
    shards: list[Shard] = []
    for first in range(0, rows, SHARD_ROWS):
        ids = np.arange(first, min(first + SHARD_ROWS, rows))
        images = generator.integers(0, 256, (len(ids), *SHAPE), np.uint8)
        part = Rows(ids, {"input": Dense(images), "target": Dense(generator.integers(0, 10, len(ids)))})
        shards.append(write_shard(place, f"train-{len(shards):05d}.parquet", part, columns))
    manifest = Manifest(source="synthetic", columns=columns, splits={"train": tuple(shards)})
    place.write_text(MANIFEST, manifest.model_dump_json())


def stream(folder: str) -> None:
    """One epoch; prints the process's peak memory in MiB before and after, and the rows seen."""
    data = DataSet(folder)
    order = training_order(data.manifest, global_batch_size=BATCH, seed=0, window=WINDOW)
    assert isinstance(order, LaneOrder)
    names = ("input", "target")
    reading = Reading(data.manifest, torch.device("cpu"), names=names, scale="standard", seed=0)
    rows = StreamedRows(data, order, reading, rank=0, world_size=1)
    before = _peak_mib()
    seen = sum(batch.place.num_rows for (batch,) in rows.batches(0))
    print(json.dumps({"before": before, "peak": _peak_mib(), "rows": seen}))


def _peak_mib() -> float:
    # not getrusage: its maximum begins with what the parent had when it forked
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    chosen = options(__doc__, repetitions=3, rows=60_000, larger=480_000)
    with scratch() as folder:
        sizes = {"larger": chosen.larger, "smaller": chosen.rows}
        for name, rows in sizes.items():
            synthetic(folder / name, rows)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sizes}
        for _ in range(chosen.repetitions):
            for name, rows in sizes.items():
                figures = json.loads(fresh_process(__file__, "--stream", folder / name)[1])
                assert figures["rows"] == rows
                runs[name].append(figures)
    pairs = [(larger["peak"], smaller["peak"]) for larger, smaller in zip(*runs.values(), strict=True)]
    added = {name: round(max(run["peak"] - run["before"] for run in figures), 1) for name, figures in runs.items()}
    held = {name: round(rows * np.prod(SHAPE) / 2**20, 1) for name, rows in sizes.items()}
    publish(
        "streaming_memory", [Case("peak memory", "<= 1.1", "MiB", pairs)], rows=sizes, window=WINDOW, batch=BATCH,
        added_by_streaming=added, set_in_memory_would_be=held,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stream"]:
        stream(sys.argv[2])
    else:
        main()
