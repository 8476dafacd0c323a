"""Fit: whether model, objective, data and the other sections of a recipe go together."""

import logging
from contextlib import suppress

import torch

from cluster.data.augment import check_augment
from cluster.data.manifest import Manifest
from cluster.data.order import shuffle_window
from cluster.data.scaling import Scaling
from cluster.recipe.recipe import Recipe
from cluster.recipe.sweep import CHANGEABLE
from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.zoo import OBJECTIVES

logger = logging.getLogger(__name__)


def check(recipe: Recipe, manifest: Manifest) -> None:
    """Raise UserError where the recipe cannot be trained on such data, naming the path and the fix."""
    signature = manifest.signature
    recipe.objective.check(recipe.model)
    _check_target(recipe, signature)
    _check_halves(recipe)
    _check_changes(recipe)
    _check_bucket(recipe, manifest)
    if not manifest.rows("train"):
        raise UserError("data", f"{recipe.data.kind} has no training rows", "add some")
    if recipe.adversarial is not None:
        for split in ("validation", "test") if manifest.rows("test") else ("validation",):
            recipe.adversarial.quality.num_rows(manifest, split)  # refuses splits that are too small to compare with
    read = {name: stored for name, stored in manifest.columns.items() if name in recipe.columns}
    Scaling(read, recipe.scale, torch.device("cpu"))  # refuses a scale that a column cannot be had at
    check_augment(recipe.data.augment, manifest, recipe.columns, source=recipe.data.kind)
    recipe.model.check(signature)


def warn_about_classes(manifest: Manifest, recipe: Recipe | None = None) -> None:
    """Say which classes a split has no row of: what is measured there says nothing of them.

    Not where a recipe reads no classes, nor of those that it leaves out of training.
    """
    if recipe is not None and "target" not in recipe.columns:
        return
    left_out = getattr(recipe.data, "anomaly", ()) if recipe is not None else ()
    for split, absent in manifest.absent_classes().items():
        if not (missing := [name for name in absent if name not in left_out]):
            continue
        few = ", ".join(missing[:5]) + ", …" * (len(missing) > 5)
        of = "no training row is" if split == "train" else f"no row of the {split} split is"
        logger.warning("data: %s of the class%s %s", of, "es" * (len(missing) > 1), few)


def _check_target(recipe: Recipe, signature: Signature) -> None:
    """The objective predicts what there is; where it does not, the fix is one that is not refused in turn."""
    objective = recipe.objective
    try:
        objective.check_data(signature, source=recipe.data.kind)
        objective.build(signature)  # refuses a number of outputs that makes no sense
    except UserError as error:
        if error.path != "objective.kind" or "target" not in objective.reads:
            raise
        found = recipe.data.target_fix(objective.reads["target"]) or _other_objective(recipe, signature)
        if found is None:
            raise
        field, fix = found
        raise UserError(error.path, error.message, fix, names=(field,)) from None


def _other_objective(recipe: Recipe, signature: Signature) -> tuple[str, str] | None:
    """(field, fix): the objective that predicts such a target from what the model gives."""
    for kind, other in OBJECTIVES.items():
        fits = isinstance(signature.columns.get("target"), other.reads.get("target", ()))
        if not fits or not recipe.model.gives & other.takes or kind == recipe.objective.kind:
            continue
        with suppress(UserError):  # it wants more of the rows than a kind of target
            other.model_validate({}).check_data(signature, source=recipe.data.kind)
            return "objective.kind", f"set objective.kind to {kind}"
    return None


def _check_halves(recipe: Recipe) -> None:
    """The section `adversarial` stands exactly where there are two halves."""
    if recipe.adversarial is None:
        return
    if "halves" not in recipe.model.gives:
        raise UserError(
            "adversarial",
            f"the objective {recipe.objective.kind} has no two halves",
            "leave this section out, or set objective.kind to adversarial",
        )
    if recipe.train.accumulation > 1:
        raise UserError(
            "train.accumulation",
            f"{recipe.train.accumulation} pieces",
            "the halves of a GAN take each batch at once, so set it to 1, and lower train.global_batch_size or use "
            "more workers",
        )
    if recipe.train.record_grad_norm:
        raise UserError(
            "train.record_grad_norm", "the halves of a GAN keep none of their gradients' norms", "leave it out"
        )


def _check_bucket(recipe: Recipe, manifest: Manifest) -> None:
    """Rows of like length are put together where they differ in length and are shuffled as a whole."""
    if recipe.data.bucket is None:
        return
    what, fix = str(recipe.data.bucket), "leave it out"
    if manifest.order == "streams":
        raise UserError("data.bucket", f"{what}: rows are windows of one text, in its order", fix)
    if all(manifest.signature[name].layout == "dense" for name in recipe.columns):
        raise UserError("data.bucket", f"{what}: rows of {recipe.data.kind} are all of one length", fix)
    if shuffle_window(manifest, recipe.data.shuffle_window) is not None:
        raise UserError(
            "data.bucket",
            f"{what}: rows that are streamed are shuffled within their windows only",
            fix if recipe.data.shuffle_window is None else "leave it or data.shuffle_window out",
        )


def _check_changes(recipe: Recipe) -> None:
    for change in recipe.changes:
        for path in change.set:
            if path.split(".")[0] not in CHANGEABLE or path in CHANGEABLE or path.endswith(".kind"):
                raise UserError(
                    "changes",
                    f"{path} cannot change in mid-training",
                    f"leave it out (fields of {', '.join(CHANGEABLE)} can)",
                )
        recipe.at(change.epoch)  # refuses values that are wrong
    if recipe.changes and recipe.adversarial is not None:
        raise UserError("changes", "the halves of a GAN keep their values", "leave this section out")
