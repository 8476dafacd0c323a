"""Which trials can train together as one batched model, and for which of them that pays."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from cluster.data.loader import shuffle_window
from cluster.data.manifest import Manifest
from cluster.training.recipe import Recipe

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
    "model.dropout",
    "train.seed",
)


def why_not(recipe: Recipe) -> str | None:
    """Why this recipe's trials cannot be fused, as `path: reason`; None where they can."""
    if recipe.adversarial is not None:
        return "adversarial: the two halves of a GAN take turns"
    if recipe.train.compile:
        return "train.compile: torch.compile would compile one trial's model, not the batch of them"
    if recipe.train.precision != "fp32":
        return f"train.precision: {recipe.train.precision}: fused trials are computed in fp32"
    if recipe.model.kind == "custom":
        return "model.kind: custom: your own code may look at values, or keep a state, which has no batch"
    return None


def groups(recipes: Sequence[Recipe], limit: int | None = None, *, manifest: Manifest | None = None) -> list[list[int]]:
    """Places of the recipes that can train together, at most `limit` a group, in the order they are given.

    A recipe that cannot be fused is a group of its own. The `manifest` of their data says whether rows are streamed
    (without it, only a shuffle window does): then those of different seeds do not go together.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for place, recipe in enumerate(recipes):
        key = f"alone {place}" if why_not(recipe) else _rest(recipe, manifest)
        alike[key].append(place)
    size = limit or len(recipes) or 1
    cut = [places[first : first + size] for places in alike.values() for first in range(0, len(places), size)]
    return sorted(cut)


def pays(recipe: Recipe) -> bool:
    """Whether fused trials are quicker on a CPU than one after the other; see tests/benchmarks/fused.py."""
    return why_not(recipe) is None


def _rest(recipe: Recipe, manifest: Manifest | None) -> str:
    """All that must be equal."""
    content: dict[str, Any] = recipe.model_dump(mode="json")
    del content["name"]
    window = recipe.data.shuffle_window
    streamed = (shuffle_window(manifest, window) if manifest else window) is not None
    for path in FUSABLE:
        section, field = path.split(".")
        if not (streamed and path == "train.seed"):
            content[section].pop(field, None)
    return json.dumps(content, sort_keys=True)
