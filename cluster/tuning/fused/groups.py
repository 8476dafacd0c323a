"""Which trials can train together as one batched model, and for which of them that pays."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cluster.data.manifest import Manifest
from cluster.data.order import shuffle_window
from cluster.recipe.recipe import Recipe
from cluster.tuning.fused.model import FusedModel
from nn_models.errors import Problem
from nn_models.objectives import Asked
from nn_models.signature import Signature

# What may differ between the trials of a group.
FUSABLE = (
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "optimizer.nesterov",
    "optimizer.betas",
    "optimizer.alpha",
    "optimizer.eps",
    "objective.label_smoothing",
    "objective.beta",
    "objective.level",
    "objective.rho",
    "objective.weight",
    "model.dropout",
    "train.seed",
)


# One trial's activations after the first convolution up to which fused CNNs were quicker; see `pays`.
MOST_ACTIVATION_BYTES = 4 << 20


def why_not(recipe: Recipe, manifest: Manifest | None = None) -> Problem | None:
    """Why this recipe's trials cannot be fused; None where they can.

    Which columns its data has, the `manifest` says; a model that vmap shall batch is tried out on such rows, and
    refused without one.
    """
    kind, objective = recipe.model.kind, recipe.objective
    if "halves" in recipe.model.gives:
        return Problem("adversarial", "the two halves of a GAN take turns")
    if recipe.changes:
        return Problem("changes", "one trial's values would change while the others' do not")
    if recipe.train.compile:
        return Problem("train.compile", "torch.compile would compile one trial's model, not the batch of them")
    if recipe.train.precision != "fp32":
        return Problem("train.precision", f"{recipe.train.precision}: fused trials are computed in fp32")
    if recipe.model.batches is None:
        return Problem("model.kind", f"{kind}: no batch of such models is known")
    if not objective.fuses or objective.counts is not None:
        return Problem("objective.kind", f"{objective.kind}: it asks more of a model than its outputs for each row")
    if objective.gathered:
        path = "objective.metrics" if "metrics" in type(objective).model_fields else "objective"
        return Problem(path, f"{', '.join(objective.gathered)}: of all of a split's rows together")
    if manifest is not None and (ragged := _ragged(recipe, manifest.signature)):
        return Problem("data", f"the rows' {ragged} differ in length, so that those of several trials make no batch")
    if recipe.model.batches == "vmap":
        if manifest is None:
            return Problem("model.kind", f"{kind}: whether vmap can batch it is only known with its data")
        if reason := unbatchable(recipe, manifest.signature):
            return Problem("model.kind", f"{kind}: vmap cannot batch it ({reason})")
    return None


def _ragged(recipe: Recipe, signature: Signature) -> str:
    """The columns that are read and whose rows are not all of one shape, in words."""
    read = recipe.columns & signature.columns.keys()
    return " and ".join(name for name in sorted(read) if signature[name].layout != "dense")


def groups(recipes: Sequence[Recipe], limit: int | None = None, *, manifest: Manifest | None = None) -> list[list[int]]:
    """Places of the recipes that can train together, at most `limit` a group, in the order they are given.

    A recipe that cannot be fused is a group of its own. The `manifest` of their data says whether rows are streamed
    (without it, only a shuffle window does): then those of different seeds do not go together; and see `why_not`.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for place, recipe in enumerate(recipes):
        key = f"alone {place}" if why_not(recipe, manifest) else _rest(recipe, manifest)
        alike[key].append(place)
    size = limit or len(recipes) or 1
    cut = [places[first : first + size] for places in alike.values() for first in range(0, len(places), size)]
    return sorted(cut)


def pays(recipe: Recipe, manifest: Manifest) -> bool:
    """Whether fused trials of this recipe are quicker on a CPU than one after the other.

    Measured by tests/benchmarks/fused.py and variations of it, on one thread, against the ordinary loop's steps:

        16 MLPs 64-128-10, batches of 64        4.2 to 4.7 times as quick; 4 of them 2.1, 2 of them 1.2
        16 MLPs 64-32-10 / 64-512-10            6.3 / 2.9
        16 MLPs 784-128-10, batches of 128      2.0 to 2.6, with different seeds 1.6; 4 of them 2.1
        8 MLPs 784-512-512-10, batches of 128   1.7
        16 CNNs 16-32 on 8x8 / 14x14 / 28x28, batches of 64     2.0 / 1.5 / 1.4
        4 CNNs 32-64 on 28x28, batches of 64 / 128              1.1 / 0.9; 16 of them 0.7
        4 small AlexNets on 32x32                               1.0

    What is saved is what a step costs beside its arithmetic (of an MLP 784-128-10 half a step is matrix products, and
    here oneDNN's are twice as quick as those of the ordinary loop). Where a convolution is large there is nothing to
    save, and activations of all trials no longer fit a cache. Your own models are fused only where that is asked for.
    """
    size = recipe.model.feature_map_size(manifest.signature)
    if size is None or why_not(recipe, manifest) is not None:
        return False
    return size * 4 * recipe.train.global_batch_size // recipe.train.accumulation <= MOST_ACTIVATION_BYTES


def _rest(recipe: Recipe, manifest: Manifest | None) -> str:
    """All that must be equal."""
    content: dict[str, Any] = recipe.model_dump(mode="json")
    for path in ("name", "sweep"):
        content.pop(path, None)
    window = recipe.data.shuffle_window
    streamed = (shuffle_window(manifest, window) if manifest else window) is not None
    for path in FUSABLE:
        section, field = path.split(".")
        if not ((streamed or recipe.objective.draws) and path == "train.seed"):
            content[section].pop(field, None)
    return json.dumps(content, sort_keys=True)


def unbatchable(recipe: Recipe, signature: Signature) -> str | None:
    """Why vmap cannot run this recipe's model, found by trying it on two rows; None where it gives the right outputs.

    A state that the model keeps outside its buffers is not found: it is then the state of all trials.
    """
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": recipe.train.seed + 1})})
    with torch.random.fork_rng(devices=[]):
        rows = cast(Tensor, signature["input"].imagine(2))  # not ragged: see why_not
        if rows.is_floating_point():
            rows = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        try:
            batched = FusedModel([recipe, other], signature, device=torch.device("cpu"))
            for training in (True, False):
                batched._template.train(training)
                own = torch.stack((rows, rows), 1)
                outputs = batched._outputs(batched.parameters, batched.buffers, Asked(own, False))
            expected = batched.plain.eval()(rows)
            torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)
        except Exception as error:  # the model may do anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return f"{type(error).__name__}: {reason}"
    return None
