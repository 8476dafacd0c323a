"""Steps: how long a worker of this node takes to its first step, and for each one after it."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.context import LocalContext
from cluster.training.splits import Splits

STEPS_S = 3.0  # for the steps after the first
MOST_STEPS = 20


@dataclass(frozen=True)
class Steps:
    """Seconds."""

    first_s: float  # from rows that are there to the end of the first step: building the model, warming up
    each_s: float  # median of those after it


def measure_steps(recipe: Recipe, splits: Splits, *, replicas: int, threads: int, use_gpu: bool) -> Steps:
    """Take some steps with the share of a global batch that one of so many replicas has; nothing of it is kept.

    With 0 `threads` torch takes those that it has. For a GAN the steps are those of both halves, one after the other.
    Raises UserError or what torch raises where a step fails.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    device = torch.device("cuda" if use_gpu else "cpu")
    try:
        began = time.perf_counter()
        with _stepping(recipe, splits, replicas=replicas, device=device) as step:
            times: list[float] = []
            last = began
            while len(times) < 2 or (sum(times[1:]) < STEPS_S and len(times) <= MOST_STEPS):
                step()
                if use_gpu:
                    torch.cuda.synchronize()
                now = time.perf_counter()
                times.append(now - last)
                last = now
            return Steps(times[0], statistics.median(times[1:]))
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stepping(recipe: Recipe, splits: Splits, *, replicas: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """What takes the next step."""
    share = -(-recipe.train.global_batch_size // replicas)
    # compiling takes as long as it takes, once: what is measured are steps without
    train = recipe.train.model_copy(update={"compile": False, "global_batch_size": share})
    recipe = recipe.model_copy(update={"train": train})
    if "halves" in recipe.model.gives:
        from cluster.adversarial.players import LocalPlayers

        players = LocalPlayers(recipe, splits, device=device)
        numbers = count()

        def play() -> None:
            players.play(next(numbers), 1, 1.0)

        yield play
        return
    from cluster.training.loop import Loop

    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        context = LocalContext(run=Folder(folder), splits=splits, device=device)
        with closing(Loop(recipe, context)) as loop:
            loop.model.train()
            pieces = train.accumulation
            batches = (batch for epoch in count() for batch in loop.rows.batches(epoch, pieces=pieces))

            def step() -> None:
                loop.step(next(batches), loop.objective, rate_factor=1.0)
                if loop.pending.full:
                    loop.pending.collect()

            yield step
