"""Recipe: model + data + objective + optimizer + schedule + train, read from YAML, validated before any work."""

import re
from collections.abc import Callable, Hashable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.adversarial.spec import AdversarialTrainSpec
from cluster.data.augment import MOVING
from cluster.data.manifest import Manifest
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.storage import Folder
from cluster.training.optimizers import AdamWSpec, AnyOptimizerSpec, AnyScheduleSpec, ConstantSpec
from cluster.tuning.spec import CHANGEABLE, SweepSpec
from nn_models.errors import UserError, did_you_mean
from nn_models.objectives import AnyObjectiveSpec, ClassificationSpec, ObjectiveSpec
from nn_models.spec import Spec, override, validate
from nn_models.zoo import AnyModelSpec


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
            raise UserError(f"data: {self.data.kind} has no training rows; add some")
        if self.adversarial is not None:
            for split in ("validation", "test") if manifest.rows("test") else ("validation",):
                self.adversarial.quality.num_rows(manifest, split)  # refuses splits that are too small to compare with
        if self.data.augment and (manifest.input_dtype != "uint8" or len(manifest.input_shape) != 3):
            raise UserError(f"data.augment: {self.data.kind} has no images to change; leave it out")
        if manifest.condition_shape and (odd := [a.kind for a in self.data.augment if not isinstance(a, MOVING)]):
            raise UserError(
                f"data.augment: {', '.join(odd)} would not change both images of a pair alike; leave it out, and use "
                f"{', '.join(spec.model_fields['kind'].default for spec in MOVING)}"
            )
        self.model.check(manifest.signature)

    def _check_target(self, objective: ObjectiveSpec, manifest: Manifest) -> None:
        if objective.target_kind != manifest.target_kind:
            raise UserError(
                f"objective.kind: {objective.kind} needs a {objective.target_kind} to predict, but "
                f"{self.data.kind} has a {manifest.target_kind}; choose another objective"
            )
        if self.adversarial is not None:
            raise UserError(
                f"adversarial: the objective {objective.kind} has no two halves; leave this section out, or set "
                "objective.kind to adversarial"
            )
        objective.build(manifest.num_outputs)  # refuses a number of outputs that makes no sense

    def _check_changes(self) -> None:
        for change in self.changes:
            for path in change.set:
                if path.split(".")[0] not in CHANGEABLE or path in CHANGEABLE or path.endswith(".kind"):
                    raise UserError(
                        f"changes: {path} cannot change in mid-training; leave it out (fields of "
                        f"{', '.join(CHANGEABLE)} can)"
                    )
            self.at(change.epoch)  # refuses values that are wrong
        if self.changes and self.adversarial is not None:
            raise UserError("changes: the halves of a GAN keep their values; leave this section out")

    def _check_adversarial(self) -> None:
        if self.train.accumulation > 1:
            raise UserError(
                f"train.accumulation: {self.train.accumulation} pieces; the halves of a GAN take each batch at once, "
                "so set it to 1, and lower train.global_batch_size or use more workers"
            )


def _kind(section: Any) -> Any:
    return section.get("kind") if isinstance(section, Mapping) else getattr(section, "kind", None)


def load_recipe(
    source: "str | Path | Mapping[str, Any] | Recipe", overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of a built-in name, a YAML file (a path or URI) or a dict, with values replaced by dotted path.

    Paths in it become absolute. Raises UserError, naming path, value and fix.
    """
    if isinstance(source, Recipe):
        recipe = source
    elif isinstance(source, Mapping):
        recipe = validate(Recipe, source)
    else:
        recipe = _from_file(str(source))
    recipe = override(recipe, overrides) if overrides else recipe
    return recipe.model_copy(update={"data": recipe.data.resolved(str(Path.cwd()))})


def builtin_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes that come with manta."""
    files = sorted(resources.files("jobs").joinpath("recipes").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text() for file in files if file.name.endswith(".yaml")}


def parse_yaml(text: str, *, name: str) -> Any:
    """YAML with the numbers people write (1e-3 is one). Raises UserError with line and column."""
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    # PyYAML lets out what its constructors run into: a date of 2020-99-99, "!!float x", a thousand brackets
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    lines = []
    for section, value in recipe.model_dump(mode="json").items():
        if value is None or value == []:  # a section that this kind of recipe does not have
            continue
        if isinstance(value, dict):
            kind = {"kind": value.pop("kind")} if "kind" in value else {}
            lines += [f"{section}:", *(f"  {field}: {_flow(inner)}" for field, inner in {**kind, **value}.items())]
        else:
            lines.append(f"{section}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def _from_file(source: str) -> Recipe:
    path = Path(source)
    if "://" in source:
        folder, _, name = source.rpartition("/")
        text = _read(source, Folder(folder).read_bytes, name)
    elif path.is_file():
        text = _read(source, path.read_bytes)
    else:
        if path.suffix in (".yaml", ".yml") or "/" in source:
            raise UserError(f"{source}: no such recipe file; `manta recipes` lists the built-in ones")
        built_in = builtin_recipes()
        if source not in built_in:
            raise UserError(f"{source}: no such recipe or file; {did_you_mean(source, built_in)}")
        text = built_in[source]
    data = parse_yaml(text, name=source)
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: a recipe is a mapping with the sections model and data, not {data!r}")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")
    return validate(Recipe, {"name": name, **data} if name else data)


def _read(source: str, read: Callable[..., bytes], *arguments: str) -> str:
    try:
        return read(*arguments).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a recipe file that can be read ({error})") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # a merge key (<<: *defaults) is no key of its own
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=deep) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Puts what `_Loader` would take for a number into quotes."""


# PyYAML follows YAML 1.1, where 1e-3 and 1e5 are strings.
for _part in (_Loader, _Dumper):
    _part.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
