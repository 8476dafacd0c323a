"""Training on one GPU: rows a second of manta's loop against a hand-written one, and how much of the time it idles.

Both keep the whole set on the GPU and use the same precision and torch.compile setting. `idle` is the share of 50
steps of manta's, after a warm-up, in which no kernel and no copy runs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from measuring import BATCH, fashion, fashion_recipe, options, publish, scratch, skip
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_in_process import compare

from cluster.data.shards import DataSet
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.context import LocalContext
from cluster.training.loop import Loop
from cluster.training.run_directory import RunDirectory
from cluster.training.splits import open_splits

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}
LARGE_BATCH = 2048


class Watched:
    """Profiles the steps between the second and the third line of metrics of the second epoch."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.log = loop, loop.journal.log
        loop.journal.log = self.report  # type: ignore[method-assign]
        self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.lines = 0

    def report(self, split: str, metrics: Mapping[str, float], **extra: Any) -> None:
        self.log(split, metrics, **extra)
        if self.loop.progress.epoch == 1 and "rows_per_s" in extra:
            self.lines += 1
            if self.lines in (2, 3):
                torch.cuda.synchronize(self.loop.context.device)
                self.profiler.start() if self.lines == 2 else self.profiler.stop()

    def busy(self) -> Iterator[tuple[float, float]]:
        """(start, end) in microseconds of whatever ran on the GPU, in the order of their starts."""
        events = [event for event in self.profiler.events() or () if event.device_type == DeviceType.CUDA]
        yield from sorted((event.time_range.start, event.time_range.end) for event in events)


def idle(recipe: Recipe, data: DataSet, device: torch.device) -> float:
    """Share of the time from the first to the last kernel in which none runs."""
    splits = open_splits(data, window=None)
    with scratch() as run:
        RunDirectory(Folder(run)).begin(recipe, {})
        loop = Loop(recipe, LocalContext(run=Folder(run), splits=splits, device=device))
        watched = Watched(loop)
        for _ in loop.epochs():
            pass
        loop.close()
    spans = list(watched.busy())
    first = reached = spans[0][0]
    working = 0.0
    for start, end in spans:  # they overlap where streams do
        working += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return round(1 - working / (reached - first), 4)


def main() -> None:
    if not torch.cuda.is_available():
        skip("gpu", "torch finds no GPU here")
        return
    chosen = options(__doc__, repetitions=5, rows=0)
    device = torch.device("cuda", 0)
    cases, idles = [], {}
    with scratch() as folder:
        data = fashion(folder / "data", rows=chosen.rows)
        for batch in (BATCH, LARGE_BATCH):
            for setting, train in SETTINGS.items():
                name = f"{setting}, batch {batch}"
                train = {**train, "global_batch_size": batch, "log_every_steps": 50 if batch == BATCH else 8}
                recipe = fashion_recipe("cnn", data, epochs=1 + chosen.repetitions, **train)
                cases.append(compare(recipe, data, device=device, name=name))
                idles[name] = idle(fashion_recipe("cnn", data, epochs=2, **train), data, device)
    publish("gpu", cases, gpu=torch.cuda.get_device_name(device), idle=idles, rows=data.manifest.rows("train"))


if __name__ == "__main__":
    main()
