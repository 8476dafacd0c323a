"""Admission: what cannot start is refused, before a worker or a step."""

import logging
import os
from typing import Any

from cluster.data.order import training_order
from cluster.recipe.recipe import Recipe
from cluster.runs.summary import summarise
from cluster.runtime import Workers, local_device
from cluster.training.run_directory import RunDirectory
from cluster.training.splits import Splits
from nn_models.errors import UserError

logger = logging.getLogger(__name__)


def refuse_what_cannot_start(recipe: Recipe, splits: Splits, workers: Workers) -> None:
    """Send imaginary rows through the model, and see that GPU and ranks have what they need."""
    train, ranks = recipe.train, max(1, workers.replicas)
    summary = summarise(recipe, splits.manifest)
    if workers.use_gpu and not workers.most:
        local_device(True)
    if ranks > train.global_batch_size:
        raise UserError(
            "train.global_batch_size",
            f"{train.global_batch_size} rows cannot be shared by {ranks} workers",
            "raise it, or use fewer workers",
        )
    order = training_order(
        splits.manifest,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        window=recipe.data.shuffle_window,
    )
    order.rows(0, 0, 0, ranks)  # a streamed set has lanes for so many ranks only
    if recipe.schedule.warmup_steps >= summary.num_steps:
        logger.warning("the learning rate is still warming up when the run ends, after %d steps", summary.num_steps)
    fewest = order.num_rows // order.num_steps // ranks // train.accumulation
    if fewest < 2 and any(layer.kind == "BatchNorm1d" for layer in summary.layers):
        raise UserError(
            "train.global_batch_size",
            f"{train.global_batch_size} leaves some of {ranks} workers a single row at once, which batch "
            "normalisation cannot learn from",
            "raise it, or lower train.accumulation or the workers",
        )


def refuse_other_recipe(recipe: Recipe, directory: RunDirectory) -> None:
    """A run goes on with the recipe that it began with."""
    began_with = directory.recipe()
    if began_with.sweep is not None:
        raise UserError("--resume", f"{directory} is a sweep, not a run", "continue it with manta sweep … --resume")
    if recipe != began_with:
        old, new = began_with.model_dump(), recipe.model_dump()
        changed = [f"{a}.{b}" for a in new for b in _differences(old[a], new[a])]
        raise UserError(
            "--resume",
            f"{directory} began with another recipe ({', '.join(changed) or 'its name'} differ)",
            f"continue it with {directory}/recipe.yaml, or start a new run",
        )


def _differences(old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return []


def workers_of(recipe: Recipe, num_workers: int | tuple[int, int], use_gpu: bool, *, alone: bool) -> Workers:
    """The Ray workers, or GAN halves, of a run. Raises UserError where there cannot be so many.

    Those of a run that has this machine to itself, `alone`, share all its cores, unless the recipe says otherwise.
    """
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    roles = 2 if recipe.model.gives == "halves" else 1
    if roles > 1 and least != most:
        raise UserError("--workers", f"{least}-{most}: the pairs of a GAN's halves cannot change in number", "give one")
    least, most = roles * least, roles * most
    cores = os.cpu_count() or 1
    share = max(1, cores // most) if most and alone else 1
    return Workers(least, most, recipe.train.cpus_per_worker or share, use_gpu, roles)
