"""Outcome: what a sweep leaves: its best trial's recipe and weights; any of its trials as a recipe of its own."""

from dataclasses import dataclass
from typing import Any

from cluster.recipe.recipe import Recipe
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from cluster.tuning.space import Space, followed
from nn_models.errors import UserError


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended. `best` is the best trial's recipe; `run` the sweep's directory."""

    status: str
    best: Recipe | None
    best_trial: TrialRecord | None
    trials: list[TrialRecord]
    run: str
    result: dict[str, Any]


def copy_model(directory: SweepDirectory, index: int) -> None:
    """The best trial's weights, beside its recipe as in a run."""
    source, out = directory.trial(index) / "model", directory.folder / "model"
    if not directory.trial(index).exists("model"):
        return
    for name in source.names():
        out.write_bytes(name, source.read_bytes(name))


def replayed(run: str, trial: int) -> Recipe:
    """The recipe that trains one trial of a sweep again, as one run: of a population, with what it took over.

    Raises UserError where there is no such trial.
    """
    directory = SweepDirectory(run)
    recipe = directory.recipe()
    found = [record for record in directory.records() if record.index == trial]
    if not found:
        raise UserError(str(directory), f"no trial {trial}", "give the number of one in trials.csv")
    found[0].lineage = directory.lineage(trial)  # the record of one that is still running has none
    return trial_recipe(recipe, found[0], name=f"{recipe.name}-{found[0].name}")


def trial_recipe(recipe: Recipe, record: TrialRecord, *, name: str) -> Recipe:
    """The recipe of one trial of the sweep `recipe`, with the changes that it went through."""
    assert recipe.sweep is not None
    base = recipe.model_copy(update={"sweep": None, "name": name})
    return followed(Space(recipe.sweep).trial(base, record.overrides), record.lineage)
