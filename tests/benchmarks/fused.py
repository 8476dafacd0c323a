"""Fused trials against one after the other by the ordinary loop's steps, on one thread: trials a second."""

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import Case, in_turn, options, publish, scratch

from cluster.data.prepare import prepare
from cluster.data.shards import DataSet
from cluster.data.sources.memory import AddingSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.context import LocalContext
from cluster.training.loop import Loop
from cluster.training.splits import Splits, open_splits
from cluster.tuning.fused.loop import FusedLoop

CPU = torch.device("cpu")
MLP = {"kind": "mlp", "hidden": [128]}
CNN = {"kind": "cnn", "channels": [16, 32], "hidden": [64]}
GRU = {"kind": "gru", "hidden": 32}  # reads an image's rows one after the other
RNN = {"kind": "rnn", "hidden": 64, "recurrent_init": "uniform"}
SGD = {"kind": "sgd", "lr": 1e-3, "momentum": 0.9}
ADAMW = {"kind": "adamw", "lr": 1e-3}
ALL_TRAINING: dict[str, Any] = {"validation_fraction": 0, "test_fraction": 0}
ADDING = "adding"  # two marked numbers of 100 are to be added
# name: model, optimizer, image size or ADDING, batch size, whether seeds differ, what is wanted of the ratio
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | str, int, bool, str]] = {
    "mlp 784-128-10": (MLP, ADAMW, 28, 128, False, ">= 3.5"),
    "mlp 784-128-10, sgd": (MLP, SGD, 28, 128, False, ">= 3.5"),
    "mlp 784-128-10, 16 seeds": (MLP, ADAMW, 28, 128, True, ">= 1"),
    "mlp 64-128-10": (MLP, ADAMW, 8, 64, False, ">= 3.5"),
    "mlp 64-128-10, 16 seeds": (MLP, ADAMW, 8, 64, True, ">= 1"),
    "cnn on 8x8": (CNN, ADAMW, 8, 64, False, ">= 1"),
    "cnn on 28x28": (CNN, ADAMW, 28, 64, False, ">= 1"),
    "gru 8-32, 8 steps": (GRU, ADAMW, 8, 64, False, ">= 1.5"),
    "gru 8-32, 8 steps, 16 seeds": (GRU, ADAMW, 8, 64, True, ">= 1"),
    "rnn 2-64, 100 steps": (RNN, SGD, ADDING, 100, False, ">= 1"),
    "gru 2-64, 100 steps": (RNN | {"kind": "gru"}, SGD, ADDING, 100, False, ">= 1"),
}


def made_rows(folder: Path, size: int | str, rows: int) -> DataSet:
    """Images of noise of `size` x `size` pixels in ten classes, or the adding problem; all to train on."""
    if isinstance(size, str):
        prepare(AddingSpec(rows=rows, **ALL_TRAINING), Folder(folder / "shards"))
        return DataSet(Folder(folder / "shards"))
    generator = np.random.default_rng(0)
    pixels = pa.array(generator.integers(0, 256, rows * size * size, dtype=np.uint8))
    columns = {"x": pa.FixedSizeListArray.from_arrays(pixels, size * size), "y": pa.array(np.arange(rows) % 10)}
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    options: dict[str, Any] = {"image_shape": (1, size, size), **ALL_TRAINING}
    spec = ParquetSpec(path=str(folder / "rows.parquet"), input="x", target="y", **options)
    prepare(spec, Folder(folder / "shards"))
    return DataSet(Folder(folder / "shards"))


def recipes(name: str, data: DataSet, trials: int) -> list[Recipe]:
    """Trials that differ in their learning rates, and in their seeds where the case says so."""
    model, optimizer, rows, batch, seeds, _ = CASES[name]
    content = {
        "model": model,
        "data": {"kind": "shards", "path": str(data.folder)},
        "objective": {"kind": "regression" if rows == ADDING else "classification"},
        "optimizer": optimizer,
        "train": {"global_batch_size": batch, "epochs": 10**6},
    }
    rates = [1e-3 * (trial + 1) / trials for trial in range(trials)]
    return [
        load_recipe(content, {"optimizer.lr": rate, "train.seed": trial if seeds else 0})
        for trial, rate in enumerate(rates)
    ]


def alone(recipe: Recipe, splits: Splits, run: Folder, stack: ExitStack) -> Callable[[], float]:
    """An epoch of the ordinary loop, without its end: trials a second, were that all a trial does."""
    loop = Loop(recipe, LocalContext(run=run, splits=splits, device=CPU))
    stack.callback(loop.close)

    def epoch() -> float:
        began = time.process_time()
        loop._epoch()
        spent = time.process_time() - began
        loop.progress.next_epoch()
        return 1 / spent

    return epoch


def together(described: list[Recipe], splits: Splits, runs: list[Folder], stack: ExitStack) -> Callable[[], float]:
    """The same for fused trials."""
    loop = stack.enter_context(FusedLoop(described, splits=splits, runs=runs, device=CPU))

    def epoch() -> float:
        began = time.process_time()
        loop._train_epoch()
        spent = time.process_time() - began
        for member in loop._live:
            member.progress.next_epoch()
        return len(described) / spent

    return epoch


def measured(name: str, folder: Path, trials: int, repetitions: int, steps: int) -> Case:
    """One case."""
    _, _, size, batch, _, wanted = CASES[name]
    data = made_rows(folder / "data", size, steps * batch)
    splits = open_splits(data, window=None)
    described = recipes(name, data, trials)
    runs = [Folder(folder / f"run-{number}").create() for number in range(trials + 1)]
    with ExitStack() as stack:
        fused = together(described, splits, runs[1:], stack)
        pairs = in_turn(repetitions, fused, alone(described[0], splits, runs[0], stack))
    assert all(math.isfinite(value) for pair in pairs for value in pair)
    return Case(name, wanted, f"trials/s of {steps} steps", pairs)


def main() -> None:
    chosen = options(__doc__, repetitions=7, trials=16, steps=50, only="")
    torch.set_num_threads(1)
    with scratch() as folder:
        cases = []
        for number, name in enumerate(name for name in CASES if chosen.only in name):
            place = folder / str(number)
            place.mkdir()
            cases.append(measured(name, place, chosen.trials, chosen.repetitions, chosen.steps))
    publish("fused", cases, threads=1, trials=chosen.trials, cores=os.cpu_count())


if __name__ == "__main__":
    main()
