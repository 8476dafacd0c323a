"""Searchers: which values the next trial gets: at random, point by point, or learnt from those before it (TPE)."""

import logging
import math
import warnings
from collections.abc import Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from cluster.recipe.distributions import Choice, Distribution, Integers, Multiples, Normal, Uniform
from cluster.recipe.sweep import SweepSpec
from cluster.tuning.space import Overrides, Space
from nn_models.errors import UserError

if TYPE_CHECKING:
    import optuna

TAILS = 1e-9  # share of a normal distribution that TPE leaves out on either side

RANDOM_SHARE = 3  # TPE starts with one in so many trials at random, and never with more than
MOST_RANDOM = 10


class Searcher(Protocol):
    """Asked for each trial's values by its index, told how it went. Trials may end in any order."""

    def ask(self, index: int) -> Overrides | None:
        """The values of trial `index` (from 0); None where there are no more."""

    def tell(self, index: int, overrides: Mapping[str, Any], value: float | None) -> None:
        """Trial `index` ended with this value of the metric; with None, or one that is not finite, it failed.

        The trial may be one that another process asked for, before this one took over.
        """


class RandomSearcher:
    """Values that depend on nothing but the seed and the index. There is always another trial."""

    def __init__(self, space: Space, *, seed: int) -> None:
        self._space, self._seed = space, seed

    def ask(self, index: int) -> Overrides | None:
        """See Searcher."""
        return self._space.sample(np.random.default_rng([self._seed, index]))

    def tell(self, index: int, overrides: Mapping[str, Any], value: float | None) -> None:
        """Nothing is learnt."""


class GridSearcher:
    """Point after point."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def ask(self, index: int) -> Overrides | None:
        """See Searcher. Fewer trials than points are the first of them."""
        return self._space.grid_point(index) if index < self._space.num_trials else None

    def tell(self, index: int, overrides: Mapping[str, Any], value: float | None) -> None:
        """Nothing is learnt."""


class OptunaSearcher:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011): like what was good, unlike what was not.

    What it proposes depends on the seed, the index, and which trials it was asked for and told of before; there is
    always another. Values within an option of a choice are learnt from the trials that had this option.
    """

    def __init__(self, space: Space, *, seed: int, mode: Literal["min", "max"]) -> None:
        """Raises UserError where Optuna is not installed."""
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "sweep.searcher", f"optuna cannot be imported ({error})", "pip install optuna, or choose random"
            ) from error
        logging.getLogger("optuna").setLevel(logging.WARNING)  # it tells of each trial
        self._optuna = optuna
        self._space, self._seed = space, seed
        self._study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
        self._asked: dict[int, tuple[optuna.Trial, Overrides]] = {}  # by index, until told
        self._told: set[int] = set()

    def ask(self, index: int) -> Overrides | None:
        """See Searcher. Asked again before it is told, it says the same."""
        if index in self._asked:
            return self._asked[index][1]
        # a sampler a trial: one that went on drawing would repeat itself in the process that takes over
        self._study.sampler = self._sampler(index)
        trial = self._study.ask()
        overrides = self._space.draw(lambda name, distribution: _suggest(trial, name, distribution))
        self._asked[index] = trial, overrides
        return overrides

    def tell(self, index: int, overrides: Mapping[str, Any], value: float | None) -> None:
        """See Searcher. The first word on a trial counts."""
        if index in self._told:
            return
        self._told.add(index)
        complete, failed = self._optuna.trial.TrialState.COMPLETE, self._optuna.trial.TrialState.FAIL
        good = value is not None and math.isfinite(value)
        draws = self._space.locate(overrides)
        if index in self._asked:
            trial, asked = self._asked.pop(index)
            if good and draws == self._space.locate(asked):
                self._study.tell(trial, value)
                return
            self._study.tell(trial, state=failed)  # it failed, or went on with other values
        if good and draws is not None:  # None: from before the space was changed
            found = {name: _encoded(d, draws[name]) for name, d in self._space.distributions() if name in draws}
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    state=complete,
                    value=value,
                    params={name: parameter for name, (_, parameter) in found.items()},
                    distributions={name: distribution for name, (distribution, _) in found.items()},
                )
            )

    def _sampler(self, index: int) -> "optuna.samplers.BaseSampler":
        seed = int(np.random.default_rng([self._seed, index]).integers(2**31))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            return self._optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=min(MOST_RANDOM, math.ceil(self._space.num_trials / RANDOM_SHARE)),
                constant_liar=True,  # trials that are running count as bad, so that many at once differ
            )


def _suggest(trial: "optuna.Trial", name: str, distribution: Distribution) -> Any:
    """What Optuna draws, as the space understands it."""
    match distribution:
        case Choice(options=options):
            return trial.suggest_categorical(name, range(len(options)))
        case Uniform(low=low, high=high, log=log):
            return trial.suggest_float(name, low, high, log=log)
        case Multiples(first=first, last=last):
            return distribution.value(trial.suggest_int(name, first, last))
        case Integers(low=low, high=high):
            return trial.suggest_int(name, low, high - 1)
        case Normal(mean=mean, std=std):  # Optuna has none: its quantiles are uniform
            return NormalDist(mean, std).inv_cdf(trial.suggest_float(name, TAILS, 1 - TAILS))


def _encoded(distribution: Distribution, value: Any) -> tuple["optuna.distributions.BaseDistribution", Any]:
    """Optuna's distribution and parameter for which `_suggest` returns this value."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match distribution:
        case Choice(options=options):
            return CategoricalDistribution(range(len(options))), value
        case Uniform(low=low, high=high, log=log):
            return FloatDistribution(low, high, log=log), float(value)
        case Multiples(first=first, last=last):
            return IntDistribution(first, last), distribution.multiple(value)
        case Integers(low=low, high=high):
            return IntDistribution(low, high - 1), int(value)
        case Normal(mean=mean, std=std):
            share = NormalDist(mean, std).cdf(value)
            return FloatDistribution(TAILS, 1 - TAILS), min(max(share, TAILS), 1 - TAILS)


def make_searcher(spec: SweepSpec, space: Space, mode: Literal["min", "max"]) -> Searcher:
    """The searcher that a sweep asks for."""
    if spec.searcher == "grid":
        return GridSearcher(space)
    if spec.searcher == "optuna":
        return OptunaSearcher(space, seed=spec.seed, mode=mode)
    return RandomSearcher(space, seed=spec.seed)
