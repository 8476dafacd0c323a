"""Importance: what a model of a table loses without each feature (nn_models/explaining.py)."""

from typing import Any, NamedTuple

import numpy as np

from cluster.recipe.loading import load_recipe
from jobs.report.files import AbsentError, mapping
from jobs.report.sections.section import EVALUATION, Run, Section
from nn_models.errors import UserError

MOST_FEATURES = 30


class Feature(NamedTuple):
    """What is lost without a feature, on average, and its deviation over the repeats; `share` of the largest."""

    name: str
    lost: float
    deviation: float
    share: float


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    if "importance/lost" not in tensors:
        return {}  # the rows are no features, or very many
    lost = tensors["importance/lost"]
    if lost.ndim != 2 or not np.isfinite(lost).all():
        raise AbsentError("what was lost is not finite")
    mean, deviation = lost.mean(1), lost.std(1)
    order = np.argsort(-mean, kind="stable")[:MOST_FEATURES]
    names, most = _names(run, len(lost)), max(float(np.abs(mean).max()), 1e-12)
    is_classes = mapping(run.recipe.get("objective")).get("kind") == "classification"
    return {
        "split": tensors.metadata.get("split", "test"),
        "num_rows": f"{int(tensors['importance/rows']):,}",
        "repeats": lost.shape[1],
        "score": "accuracy" if is_classes else "R\u00b2",
        "base": f"{float(tensors['importance/score']):.3f}",
        "features": [
            Feature(names[place], float(mean[place]), float(deviation[place]), max(0.0, mean[place] / most))
            for place in order
        ],
        "more": len(lost) - len(order),
    }


def _names(run: Run, size: int) -> list[str]:
    """The features' names in the user's file, or their numbers."""
    try:
        columns = load_recipe(dict(run.recipe)).data.file_columns
    except UserError:  # of another version, or of a kind that is not there any more
        columns = None
    if columns is not None and len(columns.input) == size:
        return list(columns.input)
    return [f"feature {number}" for number in range(size)]


SECTION = Section(name="importance", template="importance.html", read=_read, title="The features", file=EVALUATION)
