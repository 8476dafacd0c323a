"""Predicting: a file of a million made rows, against a loop by hand over its Arrow batches; and the memory that takes.

`rows/s`: both read the same Parquet file, compute the same net and write the same columns (row, class, probability,
the likeliest classes) to a Parquet file, in one process in turn. `peak memory`: a fresh process each, of all rows and
of a tenth of them, in MiB; both contain what Python, torch and pyarrow take before the first row.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import Case, fresh_process, in_turn, options, publish, scratch

import cluster
from cluster.inference.predictions import Prediction
from cluster.runs.predictor import Predictor
from cluster.storage import Folder
from jobs.commands.rows import stream_rows

WIDTH, CLASSES, TOP = 20, 10, 5
NAMES = [f"x{number}" for number in range(WIDTH)]
BATCH_ROWS = 10_000  # of the loop by hand
GROUP_ROWS = 100_000


def synthetic(file: Path, rows: int, *, labelled: bool = False) -> None:
    """Normal numbers, and a class that a linear model can learn."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(WIDTH, CLASSES))
    writer = None
    for first in range(0, rows, GROUP_ROWS):
        x = generator.normal(size=(min(GROUP_ROWS, rows - first), WIDTH)).astype(np.float32)
        columns = {name: x[:, place] for place, name in enumerate(NAMES)}
        table = pa.table({**columns, **({"y": (x @ weights).argmax(1)} if labelled else {})})
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table, row_group_size=GROUP_ROWS)
    assert writer is not None
    writer.close()


def by_manta(run: str, file: Path, out: Path) -> float:
    """Seconds."""
    began = time.perf_counter()
    prediction = Prediction(run, str(file), top=TOP)
    stream_rows(prediction.tables(), (Folder(out.parent), out.name), out=str(out))
    return time.perf_counter() - began


@torch.no_grad()
def by_hand(run: str, file: Path, out: Path) -> float:
    """Seconds."""
    began = time.perf_counter()
    model = cast(Predictor, cluster.open_model(run))
    stored, names = model.manifest.columns["input"], pa.array(model.classes)
    mean, std = torch.tensor(stored.mean), torch.tensor(stored.std)
    writer, first = None, 0
    for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=NAMES):
        x = torch.from_numpy(np.stack([batch.column(name).to_numpy() for name in NAMES], axis=1))
        likely, places = model.net((x - mean) / std).softmax(1).topk(TOP, 1)
        top = names.take(pa.array(places.numpy().ravel()))
        table = pa.table(
            {
                "row": np.arange(first, first + len(x)),
                "prediction": names.take(pa.array(places[:, 0].numpy())),
                "probability": likely[:, 0].numpy(),
                "top": pa.FixedSizeListArray.from_arrays(top, TOP),
                "top_probability": pa.FixedSizeListArray.from_arrays(pa.array(likely.numpy().ravel()), TOP),
            }
        )
        writer = writer or pq.ParquetWriter(out, table.schema)
        writer.write_table(table)
        first += len(x)
    assert writer is not None
    writer.close()
    return time.perf_counter() - began


def peak(run: str, file: str, out: str) -> None:
    """Predict once; prints the process's peak memory in MiB."""
    by_manta(run, Path(file), Path(out))
    # not getrusage: its maximum begins with what the parent had when it forked
    lines = Path("/proc/self/status").read_text().splitlines()
    print(json.dumps(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024))


def main() -> None:
    chosen = options(__doc__, repetitions=3, rows=1_000_000)
    with scratch() as folder:
        synthetic(folder / "train.parquet", 20_000, labelled=True)
        files = {"all": folder / "all.parquet", "tenth": folder / "tenth.parquet"}
        synthetic(files["all"], chosen.rows)
        synthetic(files["tenth"], chosen.rows // 10)
        data = {"kind": "parquet", "path": str(folder / "train.parquet"), "input": NAMES, "target": "y"}
        recipe = {"model": {"kind": "mlp", "hidden": [256, 256]}, "data": data, "train": {"epochs": 1}}
        run = cluster.train(recipe, run=str(folder / "run")).run
        manta, other = folder / "manta.parquet", folder / "hand.parquet"
        seconds = in_turn(
            chosen.repetitions, partial(by_manta, run, files["all"], manta), partial(by_hand, run, files["all"], other)
        )
        mine, theirs = pq.read_table(manta), pq.read_table(other)
        assert mine["row"].equals(theirs["row"])
        same = np.mean(mine["prediction"].to_numpy() == theirs["prediction"].to_numpy())
        assert same > 1 - 1e-4, same  # ties of float32, whose sums depend on how many rows are computed at once
        memory = [
            tuple(
                json.loads(fresh_process(__file__, "--peak", run, files[name], folder / "peak.parquet")[1])
                for name in ("all", "tenth")
            )
            for _ in range(chosen.repetitions)
        ]
    cases = [
        Case("rows/s", ">= 0.9", "rows/s", [(chosen.rows / one, chosen.rows / two) for one, two in seconds]),
        Case("peak memory", "<= 1.1", "MiB", cast(list[tuple[float, float]], memory)),
    ]
    publish("predicting", cases, rows=chosen.rows, width=WIDTH, net=recipe["model"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:])
    else:
        main()
