"""Target: the metric that trials are compared by, whether less of it is better, and what else a recipe reports."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from cluster.data.manifest import Manifest
from cluster.recipe.recipe import Recipe
from cluster.training.run_directory import NO_METRICS
from nn_models.errors import UserError, closest, did_you_mean
from nn_models.metrics import Better, Metric

Mode = Literal["min", "max"]
MODES: dict[Better, Mode] = {"less": "min", "more": "max"}


class Target(NamedTuple):
    """`metric`, as in result.json (`validation/accuracy`), and whether less (`min`) or more (`max`) of it is better."""

    metric: str
    mode: Mode


def history(lines: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(epochs done, value) at each epoch's end, from a run's lines of metrics; not of an untrained net."""
    split, _, name = metric.partition("/")
    ended = (line for line in lines if line["split"] == split and (split != "train" or line.get("end_of_epoch")))
    return [(line["epoch"] + 1, line[name]) for line in ended if line["step"] and isinstance(line.get(name), float)]


def figures(lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """(epochs done, metrics named as in result.json) at each epoch's end; not of an untrained net."""
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        split = line["split"]
        if line["step"] and (split == "validation" or (split == "train" and line.get("end_of_epoch"))):
            named = {f"{split}/{k}": v for k, v in line.items() if k not in NO_METRICS and isinstance(v, float)}
            found.setdefault(line["epoch"] + 1, {}).update(named)
    return list(found.items())


def target(recipe: Recipe, manifest: Manifest | None = None) -> Target:
    """What the recipe's sweep compares trials by: what its section says, else what the best weights are chosen by.

    Without a manifest, the data is taken to have a validation split, and classes where the model needs none to be
    compared. Raises UserError for a metric that the recipe does not report while it trains, and for one of which
    nobody but the user can say what is better.
    """
    known = _metrics(recipe, manifest)
    metric = recipe.sweep.metric if recipe.sweep else None
    mode = recipe.sweep.mode if recipe.sweep else None
    if metric is None:
        metric = _best(recipe, manifest)
        if metric is None:
            raise UserError(
                "sweep.metric",
                f"{recipe.data.kind} has no classes to compare what {recipe.model.kind} makes by",
                f"set it to one of {', '.join(known)}",
            )
    if metric not in known:
        why = "; trials are compared while they train, before they are tested" if metric.startswith("test/") else ""
        hint = did_you_mean(metric, known)
        split, _, name = metric.partition("/")
        if split == "validation" and name in recipe.objective.optional_metrics:
            hint = "add it to objective.metrics"
        listed = f" It reports {', '.join(known)}" if closest(metric, known) else ""
        raise UserError("sweep.metric", f"this recipe reports no {metric}{why}", f"{hint}{listed}")
    better = known[metric].better
    if mode is None and better is None:
        raise UserError(
            "sweep.mode", f"set it to min or max: whether less or more {metric} is better depends on the use"
        )
    found = mode or (MODES[better] if better else None)
    assert found is not None
    return Target(metric, found)


def reported(recipe: Recipe, manifest: Manifest | None = None) -> list[str]:
    """The metrics of each epoch, named as in result.json."""
    return list(_metrics(recipe, manifest))


def _metrics(recipe: Recipe, manifest: Manifest | None) -> dict[str, Metric]:
    """The metrics of each epoch by their names in result.json."""
    found = recipe.objective.reported(recipe.model, manifest.signature if manifest else None)
    splits = {"train": found.train, "validation": found.validation if _held_out(manifest) else ()}
    return {f"{split}/{metric.name}": metric for split, metrics in splits.items() for metric in metrics}


def kept_by(recipe: Recipe, manifest: Manifest | None = None) -> Target | None:
    """What the weights that a trial keeps are chosen by; None where they are the last ones."""
    best = _best(recipe, manifest)
    better = _metrics(recipe, manifest)[best].better if best else None
    return Target(best, MODES[better or "less"]) if best else None


def _best(recipe: Recipe, manifest: Manifest | None) -> str | None:
    """What the best weights are chosen by; None where the last ones are kept."""
    best = recipe.objective.reported(recipe.model, manifest.signature if manifest else None).best
    split = "validation" if _held_out(manifest) else "train"
    return f"{split}/{best}" if best else None


def _held_out(manifest: Manifest | None) -> bool:
    return manifest is None or manifest.rows("validation") > 0
