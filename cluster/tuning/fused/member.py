"""Member: one of several fused trials: what it would have alone beside its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np

from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints, State
from cluster.training.journal import Journal
from cluster.training.progress import Progress
from nn_models.objectives import Objective

Weights = Literal["averaged", "plain"]  # of a trial: its moving average, or what the last step has left


@dataclass
class Member:
    """Its journal is open while it is in the batch."""

    number: int  # its place among the recipes
    recipe: Recipe
    run: Folder
    checkpoints: Checkpoints
    journal: Journal
    chosen: Weights  # which of its weights are evaluated and kept
    best_weights: State | None = None  # not written yet
    about: dict[str, str] = field(default_factory=dict)  # what metrics say of the weights, where it had to be chosen

    @classmethod
    def of(cls, number: int, recipe: Recipe, run: Folder, *, names: Sequence[str], chosen: Weights) -> Self:
        """One that has not begun; `names` are the metrics whose sums are added up."""
        checkpoints = Checkpoints(run / "checkpoints", keep=recipe.train.keep_checkpoints)
        return cls(number, recipe, run, checkpoints, Journal(run, names), chosen)

    @property
    def progress(self) -> Progress:
        """Where it stands."""
        return self.journal.progress

    def validated(self, found: Mapping[Weights, Mapping[str, float]], objective: Objective) -> bool:
        """Choose the better weights of those whose metrics are there. Returns whether their loss is finite."""

        def rank(kind: Weights) -> tuple[float, float]:
            value, loss = found[kind][objective.best], found[kind]["loss"]
            if not np.isfinite(value + loss):
                return np.inf, np.inf
            return (-value if objective.better == "more" else value), loss

        self.chosen = min(found, key=rank)  # where they are equal, the first
        self.about = {"weights": self.chosen} if len(found) > 1 else {}
        self.journal.validated(found[self.chosen], **self.about)
        return bool(np.isfinite(found[self.chosen]["loss"]))

    def note_best(self, objective: Objective) -> bool:
        """Whether the epoch that has just been evaluated is its best so far."""
        return self.journal.note_best(objective.best, objective.better, **self.about)
