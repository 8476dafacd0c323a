"""Training in one process: rows a second of manta's loop against a hand-written PyTorch loop."""

import os
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from measuring import BATCH, MODELS, Case, fashion, fashion_recipe, options, publish, ready, scratch
from torch.nn import functional as F

from cluster.data.shards import DataSet
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.context import LocalContext
from cluster.training.evaluation import autocast
from cluster.training.loop import Loop
from cluster.training.run_directory import RunDirectory
from cluster.training.splits import open_splits


def hand_written(recipe: Recipe, data: DataSet, device: torch.device) -> Iterator[None]:
    """The least that trains the same model, for ever; stops for breath where manta's loop writes its metrics."""
    inputs, targets = ready(data, device)
    model = recipe.model.build(data.manifest.signature).to(device)
    if recipe.train.compile:
        model.compile()
    optimizer = recipe.optimizer.build(model.parameters())
    pause = recipe.train.log_every_steps
    while True:
        steps = torch.randperm(len(inputs), device=device).split(recipe.train.global_batch_size)
        for step, chosen in enumerate(steps, start=1):
            optimizer.zero_grad()
            with autocast(recipe.train.precision, device):
                loss = F.cross_entropy(model(inputs[chosen]), targets[chosen])
            loss.backward()
            optimizer.step()
            if step % pause == 0 or step == len(steps):
                yield


class InTurn:
    """Lets the other loop do the same number of steps whenever manta's has written a line of metrics, so that both
    meet the same machine. A pair is a whole epoch of each in seconds, with all that manta does between two epochs."""

    def __init__(self, other: Iterator[None], loop: Loop) -> None:
        self.other, self.device = other, loop.context.device
        self.log, loop.journal.log = loop.journal.log, self.report  # type: ignore[method-assign]
        self.pairs: list[tuple[float, float]] = []
        self.manta_s = self.other_s = 0.0
        self.since = perf_counter()

    def now(self) -> float:
        """The time once the device has done all it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def report(self, split: str, metrics: Mapping[str, float], **extra: Any) -> None:
        self.log(split, metrics, **extra)
        here = self.now()
        self.manta_s += here - self.since
        if extra.get("end_of_epoch"):
            self.pairs.append((self.manta_s, self.other_s))
            self.manta_s = self.other_s = 0.0
        else:
            next(self.other)
            self.other_s += self.now() - here
        self.since = self.now()


ByHand = Callable[[Recipe, DataSet, torch.device], Iterator[None]]


def compare(
    recipe: Recipe,
    data: DataSet,
    *,
    device: torch.device,
    name: str,
    wanted: str = ">= 0.97",
    by_hand: ByHand = hand_written,
) -> Case:
    """All epochs but the first, which warms up."""
    splits = open_splits(data, window=None)
    with scratch() as run:
        RunDirectory(Folder(run)).begin(recipe, {})
        other = by_hand(recipe, data, device)
        loop = Loop(recipe, LocalContext(run=Folder(run), splits=splits, device=device))
        in_turn = InTurn(other, loop)
        for _ in loop.epochs():
            pass
        loop.close()
    rows = data.manifest.rows("train")
    return Case(name, wanted, "rows/s", [(rows / manta_s, rows / other_s) for manta_s, other_s in in_turn.pairs[1:]])


def main() -> None:
    chosen = options(__doc__, repetitions=5, rows=0, threads=os.cpu_count() or 1)
    torch.set_num_threads(chosen.threads)
    with scratch() as folder:
        data = fashion(folder / "data", rows=chosen.rows)
        cases = [
            compare(
                fashion_recipe(model, data, epochs=1 + chosen.repetitions), data, device=torch.device("cpu"), name=model
            )
            for model in MODELS
        ]
    publish("training_in_process", cases, threads=chosen.threads, batch=BATCH, rows=data.manifest.rows("train"))


if __name__ == "__main__":
    main()
