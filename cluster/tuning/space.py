"""Space: the paths of a sweep and what they are drawn from; it makes overrides, and checks them against a recipe."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.data.manifest import Manifest
from cluster.recipe.distributions import (
    Choice,
    Distribution,
    Integers,
    Multiples,
    Normal,
    OfNumbers,
    Tree,
    Uniform,
    children,
    option_name,
    parse,
    text,
    walk,
)
from cluster.recipe.fit import check
from cluster.recipe.recipe import ChangeSpec, Recipe
from cluster.recipe.sweep import SweepSpec
from nn_models.errors import Problem, UserError, is_within
from nn_models.spec import override

Overrides = dict[str, Any]  # dotted path -> plain value, or whole section
Draw = Callable[[str, Distribution], Any]  # (name, distribution) -> its value, or a choice's index

DEFAULT_TRIALS = 16
MOST_POINTS = 100_000  # of a grid: more are a mistake
CONTEXTS = 256  # other values beside which a refused one is tried, before it counts as one that can never be
RESAMPLED = 0.25  # share of mutations that draw anew, and the factors of the others (Jaderberg et al. 2017)
FACTORS = (0.8, 1.2)


class Space:
    """What a sweep's trials are drawn from.

    Each value that is drawn has a name: the path, or for what stands within a choice the way to it, such as
    `optimizer.choice.0.lr`.
    """

    def __init__(self, spec: SweepSpec) -> None:
        """Raises UserError for a grid of too many points."""
        self.spec = spec
        self.trees: dict[str, Distribution] = {path: parse(raw) for path, raw in spec.space.items()}
        points = [_num_points(tree) for tree in self.trees.values()]
        self.num_grid_points: int | None = None if None in points else math.prod(n for n in points if n)
        if spec.searcher == "grid" and self.num_trials > MOST_POINTS:
            raise UserError(
                "sweep.space",
                f"a grid of {self.num_grid_points:,} points",
                f"set sweep.num_trials to at most {MOST_POINTS:,}, or sweep.searcher to random",
            )
        if spec.scheduler == "pbt" and self.num_trials < 2:
            raise UserError("sweep.space", "pbt needs 2 trials at least, but the grid has 1 point", "add values")

    @property
    def num_trials(self) -> int:
        """How many trials there are; `sweep.num_trials`, and never more than a grid has points."""
        if self.spec.searcher == "grid":
            assert self.num_grid_points is not None  # the Spec refuses a grid of anything but choices
            return min(self.num_grid_points, self.spec.num_trials or self.num_grid_points)
        return self.spec.num_trials or DEFAULT_TRIALS

    def distributions(self) -> Iterator[tuple[str, Distribution]]:
        """All that may be drawn, by name."""
        for _, name, distribution, _ in self._walk():
            yield name, distribution

    def _walk(self) -> Iterator[tuple[str, str, Distribution, dict[str, int]]]:
        for path, tree in self.trees.items():
            for name, distribution, above in walk(tree, path, {}):
                yield path, name, distribution, above

    # -- drawing ---------------------------------------------------------------------------------------------------

    def draw(self, draw: Draw) -> Overrides:
        """The overrides that `draw` decides; it is asked only for what stands in the options that it chooses."""
        return {path: _resolve(tree, path, draw) for path, tree in self.trees.items()}

    def sample(self, rng: np.random.Generator) -> Overrides:
        """Random overrides."""
        return self.draw(lambda name, distribution: distribution.sample(rng))

    def grid(self) -> list[Overrides]:
        """All points: in the order of the paths and options as they are written, the last one changing fastest."""
        assert self.num_grid_points is not None
        return [self.grid_point(index) for index in range(self.num_grid_points)]

    def grid_point(self, index: int) -> Overrides:
        """One of the points of `grid()`."""
        point: Overrides = {}
        for path, tree in reversed(self.trees.items()):
            index, place = divmod(index, _num_points(tree) or 1)
            point[path] = _point(tree, place)
        return dict(reversed(point.items()))

    def locate(self, overrides: Mapping[str, Any]) -> dict[str, Any] | None:
        """The draws, by name, that make these overrides; the first that do where several would. None where none do.

        Lists and tuples are one, so are 1 and 1.0: what has been through JSON is found again.
        """
        if set(overrides) != set(self.trees):
            return None
        draws: dict[str, Any] = {}
        for path, tree in self.trees.items():
            found = _locate(tree, path, overrides[path])
            if found is None:
                return None
            draws |= found
        return draws

    def perturb(self, overrides: Mapping[str, Any], rng: np.random.Generator) -> Overrides:
        """A mutation, as population-based training explores: each value times 0.8 or 1.2, or now and then a new one.

        Numbers stay within their bounds and integers change by 1 at least; options that are chosen stay, or are drawn
        anew. What is not of this space is drawn anew as a whole.
        """
        draws = self.locate(overrides)
        if draws is None:
            return self.sample(rng)

        def mutated(name: str, distribution: Distribution) -> Any:
            if name not in draws or rng.random() < RESAMPLED:
                return distribution.sample(rng)
            return _scaled(distribution, draws[name], rng)

        return self.draw(mutated)

    # -- against a recipe ------------------------------------------------------------------------------------------

    def trial(self, recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
        """The recipe of one trial, which has no sweep section. Raises UserError where it refuses the values."""
        return override(recipe, {**overrides, "sweep": None})

    def check(self, recipe: Recipe, manifest: Manifest | None = None) -> None:
        """Raise UserError for a path that the recipe does not have, or a value that it can never take.

        Values are tried at the bounds of each range and at each option of each choice. One that is refused may yet do
        beside other values of the space (a momentum only beside `kind: sgd`), so it is tried beside many of them.
        With a manifest, model, objective and data must fit each other, too.
        """
        problems = []
        for path, name, distribution, above in self._walk():
            middle, *ends = distribution.probes()
            for value in (*ends, middle):  # what is wrong with a range is best told of its ends
                refusal = self._never(recipe, manifest, path, {**above, name: value})
                if refusal is not None:
                    problems.append(_explain(path, name, distribution, value, refusal))
                    if not isinstance(distribution, Choice):
                        break  # the other end would say the same
        if problems:
            raise UserError.of(problems)

    def _never(self, recipe: Recipe, manifest: Manifest | None, path: str, pinned: Mapping[str, Any]) -> Problem | None:
        """Why a trial whose draws at `path` are `pinned` is always refused; None where it need not be."""
        refusals = []
        for attempt in range(CONTEXTS + 1):
            rng = np.random.default_rng(attempt)
            alone = attempt == 0

            def draw(name: str, distribution: Distribution, rng: Any = rng, alone: bool = alone) -> Any:
                if name in pinned:
                    return pinned[name]
                return distribution.probes()[0] if alone else distribution.sample(rng)

            # not always all other paths: one of them may be wrong itself
            beside = {other for other in self.trees if not alone and rng.random() < 0.75}
            overrides = {p: _resolve(tree, p, draw) for p, tree in self.trees.items() if p == path or p in beside}
            try:
                trial = self.trial(recipe, overrides)
                if manifest is not None:
                    check(trial, manifest)
            except UserError as error:
                own = (problem for problem in error.problems if is_within(problem.path, path))
                refusals.append(next(own, error.problems[0]))
            else:
                return None
        # where the path exists beside other values, what is wrong with this value there says more
        there = (
            refusal
            for refusal in refusals
            if is_within(refusal.path, path) and not (refusal.path == path and refusal.kind == "unknown field")
        )
        return next(there, refusals[0])

    def extremes(self) -> Iterator[Overrides]:
        """Overrides among which each option of each choice and both ends of each range occur."""
        for _, name, distribution, above in self._walk():
            for value in distribution.probes():
                pinned = {**above, name: value}
                yield self.draw(lambda n, d, pinned=pinned: pinned.get(n, d.probes()[0]))  # type: ignore[misc]

    # -- for people ------------------------------------------------------------------------------------------------

    def describe(self) -> list[tuple[str, str]]:
        """Each path with what it is drawn from, in words."""
        return [(path, text(tree)) for path, tree in self.trees.items()]


def followed(recipe: Recipe, lineage: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe of a whole lineage (see TrialRecord), which `manta train` repeats as one run."""
    if not lineage:
        return recipe
    changes = tuple(ChangeSpec(epoch=entry["epoch"], set=entry["set"]) for entry in lineage[1:])
    return override(recipe, lineage[0]["set"]).model_copy(update={"changes": changes})


def columns(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as columns of a table: sections become their fields, by dotted path, and lists become text."""
    flat: dict[str, Any] = {}
    for path, value in overrides.items():
        if isinstance(value, Mapping) and value:
            flat |= columns({f"{path}.{key}": inner for key, inner in value.items()})
        else:
            flat[path] = json.dumps(value) if isinstance(value, (list, tuple, Mapping)) else value
    return flat


def _resolve(tree: Tree, name: str, draw: Draw) -> Any:
    """The plain value of a Tree."""
    if isinstance(tree, Choice):
        index = draw(name, tree)
        return _resolve(tree.options[index], option_name(name, tree, index), draw)
    if isinstance(tree, Distribution):
        return draw(name, tree)
    resolved = {key: _resolve(inner, f"{name}.{key}", draw) for key, inner in children(tree)}
    if isinstance(tree, Mapping):
        return resolved
    return list(resolved.values()) if isinstance(tree, list) else copy.deepcopy(tree)


def _num_points(tree: Tree) -> int | None:
    """In how many ways a Tree can be resolved; None where they cannot be counted."""
    if isinstance(tree, Choice):
        counts = [_num_points(option) for option in tree.options]
        return None if None in counts else sum(count for count in counts if count)
    if isinstance(tree, Distribution):
        return None
    counts = [_num_points(inner) for _, inner in children(tree)]
    return None if None in counts else math.prod(count for count in counts if count)


def _point(tree: Tree, index: int) -> Any:
    """The `index`-th way in which a Tree can be resolved."""
    if isinstance(tree, Choice):
        for option in tree.options:
            count = _num_points(option) or 0
            if index < count:
                return _point(option, index)
            index -= count
    resolved: dict[Any, Any] = {}
    for key, inner in reversed(list(children(tree))):
        index, place = divmod(index, _num_points(inner) or 1)
        resolved[key] = _point(inner, place)
    if isinstance(tree, Mapping):
        return dict(reversed(resolved.items()))
    return list(reversed(resolved.values())) if isinstance(tree, list) else copy.deepcopy(tree)


def _locate(tree: Tree, name: str, value: Any) -> dict[str, Any] | None:
    """The draws that resolve a Tree to this value."""
    if isinstance(tree, Choice):
        for index, option in enumerate(tree.options):
            found = _locate(option, option_name(name, tree, index), value)
            if found is not None:
                return {name: index, **found}
        return None
    if isinstance(tree, OfNumbers):
        return {name: value} if tree.holds(value) else None
    if isinstance(tree, Mapping):
        inside = value if isinstance(value, Mapping) and set(value) == set(tree) else None
    elif isinstance(tree, list):
        same_length = isinstance(value, (list, tuple)) and len(value) == len(tree)
        inside = dict(enumerate(value)) if same_length else None
    else:
        # True == 1 to Python, not to a recipe
        return {} if value == tree and isinstance(value, bool) == isinstance(tree, bool) else None
    if inside is None:
        return None
    draws: dict[str, Any] = {}
    for key, inner in children(tree):
        found = _locate(inner, f"{name}.{key}", inside[key])
        if found is None:
            return None
        draws |= found
    return draws


def _scaled(distribution: Distribution, value: Any, rng: np.random.Generator) -> Any:
    """A value near this one."""
    factor = float(rng.choice(FACTORS))
    if isinstance(distribution, Uniform):
        return min(max(value * factor, distribution.low), distribution.high)
    if isinstance(distribution, Normal):
        return value * factor
    if isinstance(distribution, Multiples):
        multiple = distribution.multiple(value)
        assert multiple is not None  # it was located
        return distribution.value(_scaled_integer(multiple, factor, distribution.first, distribution.last))
    if isinstance(distribution, Integers):
        return _scaled_integer(int(value), factor, distribution.low, distribution.high - 1)
    return value


def _scaled_integer(value: int, factor: float, least: int, most: int) -> int:
    step = round(abs(value) * abs(factor - 1)) or 1
    return min(max(value + (step if factor > 1 else -step), least), most)


def _explain(path: str, name: str, distribution: Distribution, value: Any, refusal: Problem) -> Problem:
    """What is wrong with a value that a recipe refuses."""
    if refusal.kind and path == refusal.path:
        return refusal._replace(path=f"sweep.space.{path}")
    message = f"{refusal.path}: {refusal.message}"
    if refusal.kind and is_within(path, refusal.path):
        return Problem(f"sweep.space.{path}", message, refusal.fix)
    if isinstance(distribution, Choice):
        option = option_name(name, distribution, value)
        drawn = f"{text(distribution.options[value])} can be in no trial"
        return Problem(f"sweep.space.{option}", f"{drawn}: {message}", refusal.fix)
    drawn = f"{distribution} reaches {value:.6g}, which can be in no trial"
    return Problem(f"sweep.space.{name}", f"{drawn}: {message}", refusal.fix)
