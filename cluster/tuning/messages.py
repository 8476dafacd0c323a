"""Messages: what a sweep tells its trials' processes through Ray Tune, and the names in what they report back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster.recipe.recipe import Recipe
from cluster.tuning.fused.pruning import PruningRule

# Tune takes a trial's configuration as a dict. Ours has this key alone: a TrialConfig, or a FusedConfig.
CONFIG = "trial"

# In what a trial reports, beside its metrics, which are named as in result.json.
EPOCH = "epoch"  # epochs done, which is Tune's time
DONE = "done"  # Tune's own: there are no more
OUTCOME = "outcome"  # finished | failed: in the last report of a trial that ended by itself
ERROR = "error"
MEMBERS = "members"  # of fused trials: the report of each, by its index
LEFT = "left"  # of fused trials: (status, error) of those that have ended, by their indices


class Where(NamedTuple):
    """Which rows a trial uses. Trials with the same ones share them."""

    folder: str  # of a prepared data set
    window: int | None  # data.shuffle_window, which decides what of it is held in memory


@dataclass(frozen=True)
class TrialConfig:
    """What one trial has of its own; what all of a sweep have in common is in `trials.World`."""

    index: int
    overrides: Mapping[str, Any]  # dotted path -> value
    recipe: Recipe = field(repr=False)  # with the overrides; Tune writes the others into a trial's name
    run: str  # its run directory
    where: Where

    @property
    def indices(self) -> tuple[int, ...]:
        """The sweep's trials that are one of Tune's."""
        return (self.index,)


@dataclass(frozen=True)
class FusedConfig:
    """Trials that train together, in one of Tune's. All use the same rows."""

    members: tuple[TrialConfig, ...]
    pruning: PruningRule

    @property
    def index(self) -> int:
        """What it is known by: its first member."""
        return self.members[0].index

    @property
    def indices(self) -> tuple[int, ...]:
        """See TrialConfig."""
        return tuple(member.index for member in self.members)

    @property
    def where(self) -> Where:
        """See TrialConfig."""
        return self.members[0].where


Config = TrialConfig | FusedConfig
