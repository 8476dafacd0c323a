"""evaluate: the figures of a run's best model, from RUN/model alone."""

from collections.abc import Collection
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
    ours = saved.manifest
    read = [name for name in ours.columns if name in recipe.columns]
    learned = ours.model_copy(update={"columns": {name: ours.columns[name] for name in read}})
    source = data.fitted_to(learned) if data else recipe.data
    other = prepared(source)
    theirs = other.manifest
    have, want = _row(theirs, read), _row(ours, read)
    if have != want:
        raise UserError("--data", f"the rows of {source.kind} are {have}, but the model of {run} was trained on {want}")
    for name in read:
        names, known = (manifest.signature[name].learned_names for manifest in (theirs, ours))
        if names != known:
            what = "classes" if name == "target" else f"names in {name}"
            raise UserError(
                "--data",
                f"the {what} of {source.kind} ({', '.join(names[:5])}, …) are not those of the model "
                f"({', '.join(known[:5])}, …)",
            )
    stored = _stored(theirs, ours)
    try:
        recipe.model.check(stored.signature)
    except UserError as error:
        raise UserError("--data", f"the model of {run} cannot read it: {error.message}", "give other data") from None
    if not theirs.rows(split):
        raise UserError("--split", f"{source.kind} has no rows in {split}; it has {', '.join(theirs.splits)}")
    device = device or torch.device("cpu")
    if "halves" in recipe.model.gives:
        from cluster.adversarial.features import open_features
        from cluster.adversarial.quality import measured

        if not theirs.rows("train"):
            raise UserError(
                "--data",
                f"{source.kind} has no training rows",
                "the quality of what is made is measured by a classifier of them, so add some",
            )
        found, rows_used = measured(
            folder, recipe, other, open_features(other, device=device), split=split, device=device
        )
        return {
            "metrics": jsonable(prefixed(split, found)),
            "rows": rows_used,
            "run": folder.uri,
            "data": other.folder.uri,
        }
    splits = Splits(stored, other.folder.uri, {split: other.table(split)})  # scaled as in training
    rows = splits.evaluation(split, recipe, rank=0, world_size=1, device=device)
    assert rows is not None  # there is one
    objective = cast(Objective, recipe.objective.build(ours.signature))
    metrics = evaluate(
        model.to(device),
        rows,
        objective,
        context=LocalContext(run=folder, splits=splits, device=device),
        precision=recipe.train.precision,
        figures=objective.figures(ours.signature, num_rows=rows.order.num_rows),
    )
    return {
        "metrics": jsonable(prefixed(split, metrics)),
        "rows": rows.order.num_rows,
        "run": folder.uri,
        "data": other.folder.uri,
    }


def _stored(theirs: Manifest, ours: Manifest) -> Manifest:
    """Ours, where rows that differ in length are as they are stored there: with more children of a node, and such."""
    columns = {
        name: stored.model_copy(update={"column": theirs.columns[name].column})
        if name in theirs.columns and stored.column.layout == "ragged"
        else stored
        for name, stored in ours.columns.items()
    }
    return ours.model_copy(update={"columns": columns})


def _row(manifest: Manifest, names: Collection[str]) -> str:
    """All that must be the same for a model that reads these columns, but for what is counted having the same names."""
    signature = manifest.signature
    row = {name: signature[name] for name in names if name in signature}
    told = [f"{row.pop('condition').extent} ->"] if "condition" in row else []
    for name in [name for name in row if name == "input"]:
        column = row.pop(name)
        dense = column.layout == "dense"
        told.append(f"{column.extent} {manifest.columns[name].dtype}" if dense else column.learned_extent)
    if "target" in row and row["target"].predicted:
        target = row.pop("target")
        told.append(f"with {target.num_outputs} {target.noun.split()[-1]} outputs")
    return " ".join([*told, *(f"with {name} {column.learned_extent}" for name, column in row.items())])
