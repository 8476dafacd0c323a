"""Target: the metric that trials are compared by, whether less of it is better, and what else a recipe reports."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from cluster.data.manifest import Manifest
from cluster.recipe.recipe import Recipe
from nn_models.adversarial import AdversarialSpec
from nn_models.adversarial_losses import AdversarialObjectiveSpec
from nn_models.errors import UserError, closest, did_you_mean
from nn_models.objectives import Objective

Mode = Literal["min", "max"]

BEST_OF: dict[str, Mode] = {
    "loss": "min",
    "mse": "min",
    "mae": "min",
    "accuracy": "max",
    "frechet_distance": "min",
    "kernel_distance": "min",
    "l1": "min",
    "label_agreement": "max",
    "diversity": "max",
}


class Target(NamedTuple):
    """`metric`, as in result.json (`validation/accuracy`), and whether less (`min`) or more (`max`) of it is better."""

    metric: str
    mode: Mode


def history(lines: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(epochs done, value) at each epoch's end, from a run's lines of metrics; not of an untrained net."""
    split, _, name = metric.partition("/")
    ended = (line for line in lines if line["split"] == split and (split != "train" or line.get("end_of_epoch")))
    return [(line["epoch"] + 1, line[name]) for line in ended if line["step"] and isinstance(line.get(name), float)]


def target(recipe: Recipe, manifest: Manifest | None = None) -> Target:
    """What the recipe's sweep compares trials by: what its section says, else what the best weights are chosen by.

    Without a manifest, the data is taken to have a validation split, and classes where the model needs none to be
    compared. Raises UserError for a metric that the recipe does not report while it trains, and for one of which
    nobody but the user can say what is better.
    """
    metric = recipe.sweep.metric if recipe.sweep else None
    mode = recipe.sweep.mode if recipe.sweep else None
    best, best_mode = _best(recipe, manifest)
    if metric is None:
        if best is None:
            raise UserError(
                "sweep.metric",
                f"{recipe.data.kind} has no classes to compare what {recipe.model.kind} makes by",
                f"set it to one of {', '.join(reported(recipe, manifest))}",
            )
        metric = best
    known = reported(recipe, manifest)
    if metric not in known:
        why = "; trials are compared while they train, before they are tested" if metric.startswith("test/") else ""
        hint = did_you_mean(metric, known)
        listed = f" It reports {', '.join(known)}" if closest(metric, known) else ""
        raise UserError("sweep.metric", f"this recipe reports no {metric}{why}", f"{hint}{listed}")
    name = metric.partition("/")[2]
    follows = best_mode if metric == best else BEST_OF.get(name)
    if mode is None and follows is None:
        raise UserError(
            "sweep.mode", f"set it to min or max: whether less or more {metric} is better depends on the use"
        )
    found = mode or follows
    assert found is not None
    return Target(metric, found)


def reported(recipe: Recipe, manifest: Manifest | None = None) -> list[str]:
    """The metrics of each epoch, named as in result.json."""
    splits = ["train"] if manifest and not manifest.rows("validation") else ["train", "validation"]
    if not isinstance(recipe.objective, AdversarialObjectiveSpec):
        names = ("loss", *_objective(recipe).names)
        return [f"{split}/{name}" for split in splits for name in names]
    objective, model = recipe.objective, recipe.model
    trained = ["generator_loss", "discriminator_loss"]
    if objective.loss != "wasserstein":
        trained += ["real_accuracy", "fake_accuracy"]
    if objective.l1_weight:
        trained.append("l1")
    seen = ["diversity"]
    if _has_features(recipe, manifest):
        seen += ["frechet_distance", "kernel_distance"]
    if isinstance(model, AdversarialSpec) and model.paired:
        seen.append("l1")
    elif isinstance(model, AdversarialSpec) and model.conditional and (not manifest or len(manifest.input_shape) == 3):
        seen.append("label_agreement")
    return [f"train/{name}" for name in trained] + [f"validation/{name}" for name in seen]


def _best(recipe: Recipe, manifest: Manifest | None) -> tuple[str | None, Mode]:
    """What the best weights are chosen by, as the loop and the Coordinator do it."""
    if not isinstance(recipe.objective, AdversarialObjectiveSpec):
        objective = _objective(recipe)
        if manifest and not manifest.rows("validation"):
            return objective.best_metric.replace("validation/", "train/"), objective.mode
        return objective.best_metric, objective.mode
    if _has_features(recipe, manifest):
        return "validation/frechet_distance", "min"
    paired = isinstance(recipe.model, AdversarialSpec) and recipe.model.paired
    return ("validation/l1" if paired else None), "min"


def _objective(recipe: Recipe) -> Objective:
    return recipe.supervised.build(2)  # metrics have the same names for any number of outputs


def _has_features(recipe: Recipe, manifest: Manifest | None) -> bool:
    """Whether there is a classifier to compare made rows by: see open_features."""
    if manifest is None:
        return not (isinstance(recipe.model, AdversarialSpec) and recipe.model.paired)
    return len(manifest.input_shape) == 1 or (manifest.target_kind == "label" and manifest.num_outputs >= 2)
