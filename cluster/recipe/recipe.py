"""Recipe: model + data + objective + optimizer + schedule + train, read from YAML, validated before any work."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.data.sources.catalogue import AnyDataSpec
from cluster.recipe.adversarial import AdversarialTrainSpec
from cluster.recipe.optimizers import AdamWSpec, AnyOptimizerSpec, AnyScheduleSpec, ConstantSpec
from cluster.recipe.sweep import SweepSpec
from nn_models.classification import ClassificationSpec
from nn_models.columns import Scale
from nn_models.spec import Spec, override
from nn_models.zoo import AnyModelSpec, AnyObjectiveSpec


class TrainSpec(Spec):
    """How long, in which batches, and what is kept."""

    # How a run is told of, kept and started again, and in how many threads: what it comes to does not depend on these.
    BESIDE_RESULT: ClassVar[frozenset[str]] = frozenset(
        {
            "log_every_steps",
            "record_grad_norm",
            "checkpoint_every_epochs",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "max_failures",
            "cpus_per_worker",
        }
    )

    epochs: PositiveInt = Field(10, description="passes over the training rows")
    global_batch_size: PositiveInt = Field(128, description="rows of one step over all workers together")
    accumulation: PositiveInt = Field(1, description="pieces that a worker's share of a batch is computed in")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 computes under autocast")
    compile: bool = Field(False, description="torch.compile the model")
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of the gradient")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of the moving average of the weights; validation chooses between it and the plain ones"
    )
    seed: NonNegativeInt = Field(0, lt=2**63, description="seed of weights, order of rows, dropout and augmentation")
    patience: PositiveInt | None = Field(None, description="epochs without improvement after which to stop")
    log_every_steps: PositiveInt = Field(50, description="steps between lines of metrics.jsonl")
    record_grad_norm: bool = Field(
        False, description="have the gradient's norm in lines of metrics, where clip_norm is not set either"
    )
    checkpoint_every_epochs: PositiveInt = Field(1, description="epochs between checkpoints")
    checkpoint_every_steps: PositiveInt | None = Field(None, description="steps between checkpoints within an epoch")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints that are kept")
    max_failures: NonNegativeInt = Field(3, description="times that workers which died are started again")
    cpus_per_worker: PositiveInt | None = Field(
        None,
        description="CPU cores, and so threads, of each Ray worker; by default 1, or an equal share of this machine",
    )


class ChangeSpec(Spec):
    """Values that change in mid-training, as population-based training found them."""

    epoch: PositiveInt = Field(description="epochs that are done when the values change")
    set: dict[str, Any] = Field(description="dotted path -> value; paths of optimizer, schedule or objective")


class Recipe(Spec):
    """Everything that decides a run's result."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    model: AnyModelSpec
    data: AnyDataSpec
    objective: AnyObjectiveSpec = ClassificationSpec()
    optimizer: AnyOptimizerSpec = AdamWSpec()
    schedule: AnyScheduleSpec = ConstantSpec()
    train: TrainSpec = TrainSpec()
    adversarial: AdversarialTrainSpec | None = None  # there exactly where the objective is adversarial
    changes: tuple[ChangeSpec, ...] = ()
    sweep: SweepSpec | None = None  # of `manta sweep` only: training takes no notice of it, and a trial has none

    @model_validator(mode="before")
    @classmethod
    def _adversarial_defaults(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("adversarial") and _kind(data.get("objective")) == "adversarial":
            return {**data, "adversarial": {}}
        return data

    def deciding(self) -> dict[str, Any]:
        """What decides the result, as plain values: all but the name, BESIDE_RESULT of its sections, and its data.

        Of the data there is how its rows are used in training; which rows it holds its checksums say.
        """
        content = self.model_dump(mode="json", exclude={"name"})
        beside = set(self.train.BESIDE_RESULT)
        if self.adversarial is not None and self.adversarial.mode == "pipelined":
            beside.remove("checkpoint_every_steps")  # at a checkpoint the generator waits for what it ran ahead of
        sections = {"train": beside, "sweep": self.sweep.BESIDE_RESULT if self.sweep else ()}
        for section, fields in sections.items():
            for field in fields:
                content[section].pop(field)
        content["data"] = {field: content["data"][field] for field in self.data.TRAINING_FIELDS}
        return content

    def at(self, epoch: int) -> "Recipe":
        """The recipe as its changes have made it once so many epochs are done."""
        recipe = self
        for change in self.changes:
            if change.epoch <= epoch:
                recipe = override(recipe, change.set)
        return recipe

    @property
    def columns(self) -> frozenset[str]:
        """The columns of the data that model and objective read, and those that are shown where the rows have them."""
        return frozenset({"input", *self.model.reads, *self.objective.reads, *self.objective.shows})

    @property
    def scale(self) -> Scale:
        """At which numbers are given to the model."""
        return self.objective.scale or self.model.scale


def _kind(section: Any) -> Any:
    return section.get("kind") if isinstance(section, Mapping) else getattr(section, "kind", None)
