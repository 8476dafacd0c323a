"""Admission: what cannot start is refused, before a worker or a step."""

import logging
import os
from typing import Any

from cluster.data.manifest import Manifest
from cluster.data.order import training_order
from cluster.data.word_vectors import read_vectors
from cluster.recipe.recipe import Recipe
from cluster.runs.summary import Summary, summarise
from cluster.runtime import Workers, local_device
from cluster.runtime.limits import machine_bytes, size
from cluster.storage import Folder
from cluster.training.checkpoints import WEIGHTS, changed_data, read_model
from cluster.training.identity import other_data, other_training_rows
from cluster.training.run_directory import RunDirectory, read_environment
from cluster.training.splits import Splits
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

ACTIVATIONS_MARGIN = 4  # times the memory of the machine: what layers put out is not always kept


def refuse_what_cannot_start(recipe: Recipe, splits: Splits, workers: Workers) -> None:
    """Send imaginary rows through the model, and see that GPU and ranks have what they need."""
    train, ranks = recipe.train, max(1, workers.replicas)
    summary = summarise(recipe, splits.manifest, num_workers=ranks)
    if not workers.use_gpu:
        _refuse_more_than_memory(summary)
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


def refuse_unreadable_files(recipe: Recipe, manifest: Manifest) -> None:
    """Read what the weights of a new model begin with, and say of how many words there is something."""
    if wanted := recipe.model.wanted_vectors(manifest.signature):
        found, num = len(read_vectors(wanted).places), len(wanted.words)
        logger.info("model.%s: %d of %d words have a vector there, the others are drawn", wanted.field, found, num)


def _refuse_more_than_memory(summary: Summary) -> None:
    """Raise UserError for what this machine cannot hold: nodes of a cluster are taken to be like it.

    What layers put out is an estimate, and so has a margin.
    """
    have = machine_bytes()
    if summary.parameter_bytes > have:
        raise UserError(
            "model",
            f"its {summary.num_parameters:,} weights and their optimizer take {size(summary.parameter_bytes)}, and "
            f"there are {size(have)} of memory",
            "ask for fewer or smaller layers",
        )
    if summary.activation_bytes > ACTIVATIONS_MARGIN * have:
        raise UserError(
            "train.global_batch_size",
            f"a worker's share takes about {size(summary.activation_bytes)}, and there are {size(have)} of memory",
            "lower it, raise train.accumulation, or make rows or layers smaller",
        )


def refuse_other_recipe(recipe: Recipe, directory: RunDirectory) -> Recipe:
    """A run goes on with the recipe that it began with, which is returned, but for what decides no result.

    Whether the data is the same is known once it is prepared: see `refuse_other_data`.
    """
    began_with = directory.recipe()
    if began_with.sweep is not None:
        raise UserError("--resume", f"{directory} is a sweep, not a run", "continue it with manta sweep … --resume")
    refuse_differences(recipe, began_with, directory.folder)
    return began_with


def refuse_differences(recipe: Recipe, began_with: Recipe, folder: Folder) -> None:
    """Raise UserError where a run or sweep in the folder would come to another result with this recipe."""
    if changed := _differences(began_with.deciding(), recipe.deciding()):
        raise _began_with_other(folder, changed)


def refuse_other_data(recipe: Recipe, began_with: Recipe, manifest: Manifest, folder: Folder) -> None:
    """Raise UserError where the prepared data is not that of the run or sweep in the folder.

    Where it lies, and what it was prepared from, may have changed as long as it holds the same rows in the same splits.
    """
    changed = _differences(began_with.data.identity(), recipe.data.identity(), "data")
    known = read_environment(folder).get("data")
    if known is None and changed:  # of an earlier version: nothing says that the rows are the same
        raise _began_with_other(folder, changed)
    differs = other_data(known or {}, manifest)
    if known is None and (folder / "model").exists(WEIGHTS):
        differs = other_training_rows(read_model(folder).manifest, manifest)
    if differs:
        raise _began_with_other(folder, changed) if changed else changed_data(str(folder), differs)


def _began_with_other(folder: Folder, changed: list[str]) -> UserError:
    return UserError(
        "--resume",
        f"{folder} began with another recipe ({', '.join(changed)} differ)",
        f"continue it with {folder}/recipe.yaml, or start anew with another --run",
    )


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted paths of what differs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [prefix] if old != new else []
    below = f"{prefix}." if prefix else ""
    return [path for key in {**old, **new} for path in _differences(old.get(key), new.get(key), f"{below}{key}")]


def workers_of(recipe: Recipe, num_workers: int | tuple[int, int], use_gpu: bool, *, alone: bool) -> Workers:
    """The Ray workers, or GAN halves, of a run. Raises UserError where there cannot be so many.

    Those of a run that has this machine to itself, `alone`, share all its cores, unless the recipe says otherwise.
    """
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    roles = 2 if "halves" in recipe.model.gives else 1
    if roles > 1 and least != most:
        raise UserError("--workers", f"{least}-{most}: the pairs of a GAN's halves cannot change in number", "give one")
    least, most = roles * least, roles * most
    cores = os.cpu_count() or 1
    share = max(1, cores // most) if most and alone else 1
    return Workers(least, most, recipe.train.cpus_per_worker or share, use_gpu, roles)
