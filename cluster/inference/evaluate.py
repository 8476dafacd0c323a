"""evaluate: the figures of a run's best model, from RUN/model alone."""

from typing import Any, cast

import torch

from cluster.data.manifest import Manifest
from cluster.data.prepare import prepared
from cluster.data.sources.base import DataSpec
from cluster.storage import Folder
from cluster.training.checkpoints import restore_model
from cluster.training.context import LocalContext
from cluster.training.evaluation import evaluate
from cluster.training.journal import prefixed
from cluster.training.run_directory import RECIPE, RunDirectory, jsonable
from cluster.training.splits import Splits
from nn_models.errors import UserError
from nn_models.objectives import Objective


def evaluate_run(
    run: str, *, data: DataSpec | None = None, split: str = "test", device: torch.device | None = None
) -> dict[str, Any]:
    """Metrics of the run's best model on a split of its own data, or of other data that fits it.

    Inputs are normalised as in training. Returns {"metrics": {"test/accuracy": …}, "rows", "run", "data"}.
    Raises UserError where there is no model, no such split, or the data does not fit.
    """
    folder = Folder(run)
    recipe = RunDirectory(folder).recipe(f"model/{RECIPE}")
    model, saved = restore_model(folder, recipe)
    source = data or recipe.data
    other = prepared(source)
    ours, theirs = saved.manifest, other.manifest
    have, want = _row(theirs), _row(ours)
    if have != want:
        raise UserError("--data", f"the rows of {source.kind} are {have}, but the model of {run} was trained on {want}")
    if ours.class_names != theirs.class_names:
        raise UserError(
            "--data",
            f"the classes of {source.kind} ({', '.join(theirs.class_names[:5])}, …) are not those of the model "
            f"({', '.join(ours.class_names[:5])}, …)",
        )
    if not theirs.rows(split):
        raise UserError("--split", f"{source.kind} has no rows in {split}; it has {', '.join(theirs.splits)}")
    device = device or torch.device("cpu")
    if recipe.model.gives == "halves":
        from cluster.adversarial.features import open_features
        from cluster.adversarial.quality import measured

        if not theirs.rows("train"):
            raise UserError(
                "--data",
                f"{source.kind} has no training rows",
                "the quality of what is made is measured by a classifier of them, so add some",
            )
        found = measured(folder, recipe, other, open_features(other, device=device), split=split, device=device)
        assert recipe.adversarial is not None  # it stands where there are halves
        rows_used = recipe.adversarial.quality.num_rows(theirs, split)
        return {
            "metrics": jsonable(prefixed(split, found)),
            "rows": rows_used,
            "run": folder.uri,
            "data": other.folder.uri,
        }
    splits = Splits(ours, other.folder.uri, {split: other.table(split)})  # scaled as in training
    rows = splits.evaluation(split, recipe, rank=0, world_size=1, device=device)
    assert rows is not None  # there is one
    metrics = evaluate(
        model.to(device),
        rows,
        cast(Objective, recipe.objective.build(ours.signature)),
        context=LocalContext(run=folder, splits=splits, device=device),
        precision=recipe.train.precision,
    )
    return {
        "metrics": jsonable(prefixed(split, metrics)),
        "rows": rows.order.num_rows,
        "run": folder.uri,
        "data": other.folder.uri,
    }


def _row(manifest: Manifest) -> str:
    """All that must be the same for a model to read rows."""
    signature = manifest.signature
    pair = f"{signature['condition'].extent} -> " if "condition" in signature else ""
    row = f"{signature['input'].extent} {manifest.columns['input'].dtype}"
    if "target" not in signature:
        return pair + row
    target = signature["target"]
    if not target.predicted:
        return f"{pair}{row} with {target.describe()}"
    return f"{pair}{row} with {target.num_outputs} {target.noun.split()[-1]} outputs"
