"""The recipe's section `sweep`: which values to try, how many trials, how they are chosen and which are given up."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from cluster.recipe.distributions import BadDistribution, Choice, parse, walk
from nn_models.spec import Spec, invalid

# Sections whose fields, but for the kind, may change in mid-training: they shape no weights, nothing that
# places in the order of rows refer to. What population-based training mutates, a recipe's `changes` can replay.
CHANGEABLE = ("optimizer", "schedule", "objective")


def _distribution(raw: Any) -> Any:
    """Refuse what is no distribution. What is kept is what was written, for the recipe to be printed from."""
    try:
        parse(raw)
    except BadDistribution as problem:
        raise invalid(problem.message, problem.fix, field=problem.where) from None
    return raw


class SweepSpec(Spec):
    """Many trials of one recipe that differ in the values of some paths."""

    BESIDE_RESULT: ClassVar[frozenset[str]] = frozenset({"max_failures"})  # as TrainSpec's

    space: dict[str, Annotated[Any, AfterValidator(_distribution)]] = Field(
        description="dotted path -> the distribution that its values are drawn from"
    )
    num_trials: PositiveInt | None = Field(
        None, description="trials; by default 16, or all points of a grid; fewer than those are the first of them"
    )
    metric: str | None = Field(
        None,
        description="what trials are compared by, such as validation/loss; by default as the best weights are",
    )
    mode: Literal["min", "max"] | None = Field(None, description="whether less or more is better; follows from metric")
    searcher: Literal["random", "grid", "optuna"] = Field(
        "random", description="grid takes all points in order; optuna learns from the trials that have ended (TPE)"
    )
    scheduler: Literal["none", "asha", "median", "pbt"] = Field(
        "asha",
        description="asha and median stop trials that fall behind; pbt lets them go on from better ones, mutated",
    )
    grace_epochs: PositiveInt = Field(1, description="epochs before which asha and median stop no trial")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="asha: one in so many goes on at each rung, and rungs are so many times further apart"
    )
    perturb_epochs: PositiveInt | None = Field(
        None, description="pbt: epochs between two exchanges; by default a tenth of train.epochs"
    )
    seed: NonNegativeInt = Field(0, lt=2**63, description="seed of what is drawn; train.seed is that of each trial")
    max_failures: NonNegativeInt = Field(2, description="times that a failed trial is started again")

    def perturb_every(self, epochs: int) -> int:
        """Epochs between two exchanges of population-based training, of trials of so many epochs."""
        return self.perturb_epochs or max(1, epochs // 10)

    @field_validator("space")
    @classmethod
    def _paths(cls, space: dict[str, Any]) -> dict[str, Any]:
        if not space:
            raise invalid("is empty", "give it a path and its distribution, such as optimizer.lr: {uniform: [0.1, 1]}")
        for path in space:
            if not all(part and part == part.strip() for part in path.split(".")):
                raise invalid(f"{path!r} is not a path", "write it with dots, such as optimizer.lr")
            if path.split(".")[0] == "sweep":
                raise invalid("a trial has no sweep of its own", "choose a path of another section", field=path)
            above = next((other for other in space if path.startswith(f"{other}.")), None)
            if above:
                raise invalid(
                    f"lies within {above}, which is in the space as well",
                    "put it into the sections that are chosen from there, or leave one out",
                    field=path,
                )
        return space

    @model_validator(mode="after")
    def _searcher_can_enumerate(self) -> Self:
        for name, distribution in self._distributions():
            if self.searcher == "grid" and not isinstance(distribution, Choice):
                raise invalid(
                    f"{distribution.word} has no points to try one by one",
                    "list values with grid, or set sweep.searcher to random",
                    field=f"space.{name}",
                )
            if self.searcher != "grid" and distribution.word == "grid":
                raise invalid(
                    f"all values of a grid are tried by the searcher grid only, not by {self.searcher}",
                    "set sweep.searcher to grid, or write choice",
                    field=f"space.{name}",
                )
        return self

    @model_validator(mode="after")
    def _population_can_mutate(self) -> Self:
        if self.scheduler != "pbt":
            return self
        if self.num_trials == 1:
            raise invalid(
                "pbt needs 2 trials at least, one to learn from", "set more, or scheduler: none", field="num_trials"
            )
        for path in self.space:
            if not _is_mutable(path):
                raise invalid(
                    "pbt changes values in mid-training, and this one cannot change there",
                    f"leave it out or choose another scheduler (pbt takes the fields of {', '.join(CHANGEABLE)})",
                    field=f"space.{path}",
                )
        return self

    def _distributions(self) -> Any:
        for path, raw in self.space.items():
            for name, distribution, _ in walk(parse(raw), path, {}):
                yield name, distribution


def _is_mutable(path: str) -> bool:
    section, *fields = path.split(".")
    return section in CHANGEABLE and bool(fields) and fields[-1] != "kind"
