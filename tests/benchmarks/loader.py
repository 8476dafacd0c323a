"""The loader: rows a second of one shuffled epoch, against torch's DataLoader and Ray Data.

All give batches of 128 normalised float images and their labels. DataLoader works on a set in memory, both as it is
stored (normalised batch by batch, as manta does) and as floats made beforehand: the quicker counts. Ray Data
reads the same Parquet shards, its start included (Ray itself runs already).
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

import numpy as np
import torch
from measuring import BATCH, Case, fashion, fashion_recipe, in_turn, options, publish, scratch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cluster.data.rows import table_rows
from cluster.data.scaling import Scaling
from cluster.data.shards import DataSet
from cluster.runtime import ray_session
from cluster.training.splits import open_splits

CPU = torch.device("cpu")
SHUFFLE_BUFFER = 10_000

Epoch = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def of_manta(data: DataSet) -> Epoch:
    splits = open_splits(data, window=None)
    rows = splits.training(fashion_recipe("mlp", data), rank=0, world_size=1, device=CPU)
    epochs = iter(range(1_000_000))  # each has an order of its own
    return lambda: ((batch["input"], batch["target"]) for (batch,) in rows.batches(next(epochs)))


def normaliser(data: DataSet) -> Callable[[Tensor], Tensor]:
    """Stored images as manta's loader scales them."""
    scaling = Scaling(data.manifest.columns, "standard", CPU)
    return lambda stored: scaling({"input": stored})["input"]  # type: ignore[return-value]


def of_data_loader(data: DataSet, *, floats: bool) -> Epoch:
    rows = table_rows(data.table("train"), data.manifest)
    stored, targets = (torch.from_numpy(rows.columns[name].values.copy()) for name in ("input", "target"))
    normalise = normaliser(data)
    inputs = normalise(stored) if floats else stored
    batches = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=True)
    return lambda: batches if floats else ((normalise(chosen), labels) for chosen, labels in batches)


def of_ray_data(data: DataSet) -> Epoch:
    import ray
    from ray.data.collate_fn import NumpyBatchCollateFn

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shape, normalise = data.manifest.signature.input_shape, normaliser(data)
    files = [data.folder.full(shard.file) for shard in data.shards("train")]

    class Images(NumpyBatchCollateFn):
        def __call__(self, batch: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
            pixels = np.frombuffer(bytearray(b"".join(batch["input"])), np.uint8).reshape(-1, *shape)
            return normalise(torch.from_numpy(pixels)), torch.from_numpy(batch["target"])

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        dataset = ray.data.read_parquet(files).select_columns(["input", "target"])
        yield from dataset.iter_torch_batches(
            batch_size=BATCH, local_shuffle_buffer_size=SHUFFLE_BUFFER, collate_fn=Images()
        )

    return epoch


def rate(epoch: Epoch, rows: int, *, epochs: int) -> float:
    """Rows a second of whole epochs."""
    began = perf_counter()
    seen = 0
    for _ in range(epochs):
        for inputs, targets in epoch():
            assert inputs.dtype == torch.float32
            assert len(inputs) == len(targets)
            seen += len(inputs)
    assert seen == epochs * rows
    return seen / (perf_counter() - began)


def main() -> None:
    chosen = options(__doc__, repetitions=5, rows=0, threads=os.cpu_count() or 1)
    torch.set_num_threads(chosen.threads)
    with scratch() as folder:
        data = fashion(folder / "data", rows=chosen.rows)
        rows = data.manifest.rows("train")
        manta = of_manta(data)

        def compare(name: str, wanted: str, other: Epoch) -> Case:
            # an epoch of manta's takes a few milliseconds: several of them
            pairs = in_turn(
                chosen.repetitions, lambda: rate(manta, rows, epochs=10), lambda: rate(other, rows, epochs=1)
            )
            return Case(name, wanted, "rows/s", pairs)

        cases = [
            compare("DataLoader, uint8", ">= 4", of_data_loader(data, floats=False)),
            compare("DataLoader, floats", ">= 4", of_data_loader(data, floats=True)),
        ]
        with ray_session(address=None, cpus=2, verbose=False):
            cases.append(compare("Ray Data", ">= 20", of_ray_data(data)))
    publish("loader", cases, threads=chosen.threads, batch=BATCH, rows=rows, shuffle_buffer=SHUFFLE_BUFFER)


if __name__ == "__main__":
    main()
