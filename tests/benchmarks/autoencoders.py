"""Autoencoders in one process: rows a second of manta's loop against a hand-written PyTorch loop."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from measuring import BATCH, fashion, options, publish, scratch
from torch.nn import functional as F
from training_in_process import compare

from cluster.data.rows import table_rows
from cluster.data.shards import DataSet
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "autoencoder", "hidden": [512], "code": 32},
    "convolutional": {"kind": "conv_autoencoder", "channels": [16, 32], "code": 32},
}


def hand_written(recipe: Recipe, data: DataSet, device: torch.device) -> Iterator[None]:
    """The least that trains the same net, for ever; stops for breath where manta's loop writes its metrics."""
    images = table_rows(data.table("train"), data.manifest).columns["input"].values
    rows = torch.from_numpy(images.copy()).to(device) / 255
    model = recipe.model.build(data.manifest.signature).to(device)
    optimizer = recipe.optimizer.build(model.parameters())
    pause = recipe.train.log_every_steps
    while True:
        steps = torch.randperm(len(rows), device=device).split(recipe.train.global_batch_size)
        for step, chosen in enumerate(steps, start=1):
            optimizer.zero_grad()
            batch = rows[chosen]
            F.mse_loss(model(batch), batch).backward()
            optimizer.step()
            if step % pause == 0 or step == len(steps):
                yield


def main() -> None:
    chosen = options(__doc__, repetitions=5, rows=0, threads=os.cpu_count() or 1)
    torch.set_num_threads(chosen.threads)
    with scratch() as folder:
        data = fashion(folder / "data", rows=chosen.rows)
        cases = [
            compare(
                load_recipe(
                    {
                        "model": model,
                        "data": {"kind": "shards", "path": str(data.folder)},
                        "objective": {"kind": "reconstruction"},
                        "train": {"global_batch_size": BATCH, "epochs": 1 + chosen.repetitions},
                    }
                ),
                data,
                device=torch.device("cpu"),
                name=name,
                by_hand=hand_written,
            )
            for name, model in MODELS.items()
        ]
        num_rows = data.manifest.rows("train")
    publish("autoencoders", cases, threads=chosen.threads, batch=BATCH, rows=num_rows)


if __name__ == "__main__":
    main()
