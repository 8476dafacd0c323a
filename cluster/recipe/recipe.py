"""Recipe: model + data + objective + optimizer + schedule + train, read from YAML, validated before any work."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.data.augment import MOVING
from cluster.data.manifest import Manifest
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.recipe.adversarial import AdversarialTrainSpec
from cluster.recipe.optimizers import AdamWSpec, AnyOptimizerSpec, AnyScheduleSpec, ConstantSpec
from cluster.recipe.sweep import CHANGEABLE, SweepSpec
from nn_models.errors import UserError
from nn_models.objectives import ClassificationSpec, ObjectiveSpec
from nn_models.spec import Spec, override
from nn_models.zoo import AnyModelSpec, AnyObjectiveSpec


class TrainSpec(Spec):
    """How long, in which batches, and what is kept."""

    epochs: PositiveInt = Field(10, description="passes over the training rows")
    global_batch_size: PositiveInt = Field(128, description="rows of one step over all workers together")
    accumulation: PositiveInt = Field(1, description="pieces that a worker's share of a batch is computed in")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 computes under autocast")
    compile: bool = Field(False, description="torch.compile the model")
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of the gradient")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of the moving average of the weights, which is then what is evaluated and kept"
    )
    seed: NonNegativeInt = Field(0, lt=2**63, description="seed of weights, order of rows, dropout and augmentation")
    patience: PositiveInt | None = Field(None, description="epochs without improvement after which to stop")
    log_every_steps: PositiveInt = Field(50, description="steps between lines of metrics.jsonl")
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

    def at(self, epoch: int) -> "Recipe":
        """The recipe as its changes have made it once so many epochs are done."""
        recipe = self
        for change in self.changes:
            if change.epoch <= epoch:
                recipe = override(recipe, change.set)
        return recipe

    @property
    def supervised(self) -> ObjectiveSpec:
        """The objective of a recipe that trains one net."""
        assert isinstance(self.objective, ObjectiveSpec)
        return self.objective

    def check(self, manifest: Manifest) -> None:
        """Raise UserError where model, objective and data do not fit each other."""
        self.objective.check(self.model)
        if isinstance(self.objective, ObjectiveSpec):
            self._check_target(self.objective, manifest)
        else:
            self._check_adversarial()
        self._check_changes()
        if not manifest.rows("train"):
            raise UserError("data", f"{self.data.kind} has no training rows", "add some")
        if self.adversarial is not None:
            for split in ("validation", "test") if manifest.rows("test") else ("validation",):
                self.adversarial.quality.num_rows(manifest, split)  # refuses splits that are too small to compare with
        if self.data.augment and (manifest.input_dtype != "uint8" or len(manifest.input_shape) != 3):
            raise UserError("data.augment", f"{self.data.kind} has no images to change", "leave it out")
        if manifest.condition_shape and (odd := [a.kind for a in self.data.augment if not isinstance(a, MOVING)]):
            raise UserError(
                "data.augment",
                f"{', '.join(odd)} would not change both images of a pair alike",
                f"leave it out, and use {', '.join(spec.model_fields['kind'].default for spec in MOVING)}",
            )
        self.model.check(manifest.signature)

    def _check_target(self, objective: ObjectiveSpec, manifest: Manifest) -> None:
        if objective.target_kind != manifest.target_kind:
            raise UserError(
                "objective.kind",
                f"{objective.kind} needs a {objective.target_kind} to predict, but {self.data.kind} has a "
                f"{manifest.target_kind}",
                "choose another objective",
            )
        if self.adversarial is not None:
            raise UserError(
                "adversarial",
                f"the objective {objective.kind} has no two halves",
                "leave this section out, or set objective.kind to adversarial",
            )
        objective.build(manifest.num_outputs)  # refuses a number of outputs that makes no sense

    def _check_changes(self) -> None:
        for change in self.changes:
            for path in change.set:
                if path.split(".")[0] not in CHANGEABLE or path in CHANGEABLE or path.endswith(".kind"):
                    raise UserError(
                        "changes",
                        f"{path} cannot change in mid-training",
                        f"leave it out (fields of {', '.join(CHANGEABLE)} can)",
                    )
            self.at(change.epoch)  # refuses values that are wrong
        if self.changes and self.adversarial is not None:
            raise UserError("changes", "the halves of a GAN keep their values", "leave this section out")

    def _check_adversarial(self) -> None:
        if self.train.accumulation > 1:
            raise UserError(
                "train.accumulation",
                f"{self.train.accumulation} pieces",
                "the halves of a GAN take each batch at once, so set it to 1, and lower train.global_batch_size or "
                "use more workers",
            )


def _kind(section: Any) -> Any:
    return section.get("kind") if isinstance(section, Mapping) else getattr(section, "kind", None)
