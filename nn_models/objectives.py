"""Objectives: (model, batch) -> loss, and sums of metrics with their counts.

Losses and metrics are sums over what a batch counts (its rows, or the elements of a column), never means: sums over
batches and ranks add up, and the training loop divides once.

Shapes: B rows of the batch, C classes, M metrics, R models of fused trials.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap

from nn_models.batch import Batch
from nn_models.columns import Scale
from nn_models.errors import UserError
from nn_models.evidence import Evidence
from nn_models.figures import (
    Figures,
)
from nn_models.metrics import LOSS, Metric, Reported
from nn_models.model import Gives, ModelSpec, Reads, check_column, reading
from nn_models.signature import Signature
from nn_models.spec import Spec

# The objective that is named where another one does not take what a model gives.
TRAINED_BY: Mapping[Gives, str] = {
    "reconstruction": "reconstruction",
    "posterior": "variational",
    "tree": "parsing",
    "labelled_tree": "labelled_parsing",
    "joins": "scene_parsing",
}

Across = Callable[[Tensor], Tensor]  # sums a detached tensor over all ranks


def only_here(values: Tensor) -> Tensor:
    """The sum over all ranks where there is one."""
    return values


class Measured(NamedTuple):
    """What an objective finds in one batch.

    `loss` () is the differentiable sum over all that the batch counts, at least float32. `sums` (M,) float64 and
    detached are those of the declared metrics; `counts` (M,) what each of them is to be divided by, where that is not
    what the loss counts. `outputs`, detached, are what the evidence is made of. `carry` is the detached state from
    which the same streams go on in their next windows: a tensor, or a tuple of them, with a row of the batch a row.
    """

    loss: Tensor
    sums: Tensor
    counts: Tensor | None = None
    outputs: Any = None
    carry: Any = None


INSPECTED_ROWS = 16  # of the test, whose way through the model is looked at


class Asked(NamedTuple):
    """What models of fused trials are called with: rows, and other tensors and options by their names.

    Tensors have (B, ...) the same of all trials where they are `shared`; else each trial's own, (B, R, ...).
    """

    rows: Tensor
    shared: bool
    tensors: Mapping[str, Tensor] = {}
    options: Mapping[str, Any] = {}


class Baseline(Protocol):
    """Models that come from one look at the training rows, for the test's figures to be compared with."""

    def add(self, batch: Batch) -> None:
        """Take in a batch of training rows; not of rows that stand in."""

    def models(self, across: Across, device: torch.device) -> Mapping[str, Any]:
        """Modules by name, on the device. Called by all ranks; `across` sums a tensor on the device over them.

        What they keep as persistent buffers stands beside the evidence, as `NAME.BUFFER`.
        """


class Objective(ABC):
    """What a model is trained for.

    `metrics` are those beside the loss; the best weights are those with the best `best`, the name of one or `loss`.
    """

    metrics: tuple[Metric, ...] = ()
    whole: ClassVar[tuple[Metric, ...]] = ()  # of whole splits, which `figures` can measure
    best: str = "loss"
    # whether what is said of a row's last element is said of the whole row: of a tree's root, of a text what follows it
    last_says: ClassVar[bool] = False
    sections: ClassVar[tuple[str, ...]] = ()  # the parts of the report that show what `inspect` finds

    @abstractmethod
    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Run the model on the batch. Nothing is read back from the device.

        `model` may be a wrapper that averages gradients over ranks: it can be called, with any arguments, and nothing
        else of it be asked. So a module that draws noise is given the rows' keys: `model(batch["input"], batch.keys)`.
        `carry` is what `Measured.carry` of the windows before was. `across` sums detached values over all ranks: what
        a batch has in common is then that of the global batch.
        """

    def asks(self, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]) -> Asked:
        """What R models of the same kind are called with, for `measure_each` to be given what they say."""
        return Asked(batch["input"], shared)

    def measure_each(
        self, outputs: Any, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses (R,) and sums (R, M) of R models of the same kind, whose outputs (R, B, ...) are there.

        The batch is the same for all where it is `shared`; else its values are (B, R, ...). `each` has (R,) the values
        of this objective's fields in which they differ.
        """
        assert not each  # such fields are batched by the objective that has them

        def one(outputs: Tensor, columns: Any) -> tuple[Tensor, Tensor]:
            rows = Batch(columns, batch.place, batch.draw_keys, unscale=batch.unscale)
            measured = self.measure(lambda *_: outputs, rows)
            return measured.loss, measured.sums

        in_dims = (0, None if shared else 1)
        losses, sums = vmap(one, in_dims=in_dims)(outputs, dict(batch.columns))
        return losses, sums

    def outputs(self, model: Any, batch: Batch) -> Any:
        """What the model gives for rows of which nobody knows what is to be predicted."""
        return model(batch["input"])

    def predicted(self, outputs: Any) -> Any:
        """What these outputs say of each row: the numbers of classes, or the outputs themselves."""
        return outputs

    def figures(self, signature: Signature, *, num_rows: int | None = None) -> Figures | None:
        """Metrics of a whole split: those that were asked for; of a test of so many rows all that there are."""
        return None

    def baseline(self, signature: Signature, model: ModelSpec) -> Baseline | None:
        """What the test's figures of such a model are compared with; None for nothing."""
        return None

    @property
    def compared(self) -> tuple[Metric, ...]:
        """The metrics that are measured of the baseline's models too, where they are of the model."""
        return self.metrics

    def evidence(self, signature: Signature) -> Evidence | None:
        """What there is to see of a test beside its figures; None for nothing."""
        return None

    def inspect(self, model: Any, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """What its `sections` of the report show of the trained model and the first rows of a test: see ModelSpec."""
        return {}

    def inspected_rows(self, signature: Signature) -> int:
        """How many rows `inspect` looks at, at most."""
        return INSPECTED_ROWS

    @property
    def better(self) -> Literal["less", "more"]:
        """Whether less or more of `best` is better."""
        known = {metric.name: metric.better for metric in (LOSS, *self.metrics)}
        return known[self.best] or "less"


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))  # autocast makes logits of half precision


class ObjectiveSpec(Spec):
    """Base of every objective's description: what it reads beside the model's input, and which models it takes."""

    reads: ClassVar[Reads] = reading()
    takes: ClassVar[frozenset[Gives]]
    counts: ClassVar[str | None] = None  # the column whose elements the loss counts; None: rows
    shows: ClassVar[frozenset[str]] = frozenset()  # columns that its evidence takes too, where the rows have them
    # Whether fused trials may be measured by `measure_each`, of outputs that are there: where all that the objective
    # does with a model is to call it once on what it `asks`, and it counts rows and carries nothing on.
    fuses: ClassVar[bool] = False
    draws: ClassVar[bool] = False  # whether it draws noise, in tests too: those of trials of several seeds differ
    writes: ClassVar[bool] = False  # whether outputs say which token comes next, so that a text can be written on
    forecasts: ClassVar[bool] = False  # whether outputs are the next steps of a series
    kind: str

    @property
    def scale(self) -> Scale | None:
        """At which numbers are given to the model; None where the model's own will do."""
        return None

    @property
    def gathered(self) -> tuple[str, ...]:
        """The metrics of a whole split that each validation measures as well."""
        return ()

    @property
    def optional_metrics(self) -> tuple[str, ...]:
        """Those that it could measure as well."""
        return ()

    def check(self, model: ModelSpec) -> None:
        """Raise UserError where it does not train such a model."""
        if not model.gives & self.takes:
            raise UserError("objective.kind", *self.refuse(model))

    def refuse(self, model: ModelSpec) -> tuple[str, str]:
        """What to say of a model that gives what this objective does not take, and the fix."""
        if "halves" in model.gives:
            return (
                f"{self.kind} trains one net, but {model.kind} is a generator and a discriminator",
                "set objective.kind to adversarial",
            )
        fixes = [f"set objective.kind to {TRAINED_BY[gives]}" for gives in model.gives if gives in TRAINED_BY]
        return (
            f"{self.kind} takes no model that gives {_or(model.gives)}, as {model.kind} does",
            fixes[0] if fixes else "choose another objective",
        )

    def check_data(self, signature: Signature, *, source: str) -> None:
        """Raise UserError where the rows of the source have not what it needs."""
        for name, kinds in self.reads.items():
            wanted = " or ".join(kind.noun for kind in kinds)
            fix = "choose another objective"
            if name in signature and not isinstance(signature[name], kinds):
                has = signature[name].noun
                raise UserError("objective.kind", f"{self.kind} needs {wanted} to predict, but {source} has {has}", fix)
            check_column(signature, name, kinds, path="objective.kind", reads=f"{self.kind} needs {wanted}", fix=fix)

    @abstractmethod
    def rehearse(self, description: ModelSpec, model: Any, signature: Signature, *, source: str) -> None:
        """Send two imaginary rows through the model as training will, on the device that is current.

        Raises UserError where what comes out has another shape than rows of the source need.
        """

    @classmethod
    @abstractmethod
    def known_metrics(cls) -> tuple[Metric, ...]:
        """All that it may ever report."""

    @abstractmethod
    def build(self, signature: Signature) -> Any:
        """The objective for such rows."""

    @abstractmethod
    def reported(self, model: ModelSpec, signature: Signature | None) -> Reported:
        """The metrics of each epoch. Without a signature, rows are taken to have all that could be measured."""


def _or(kinds: frozenset[Gives]) -> str:
    return " or ".join(sorted(kinds))


def _zeros_like(outputs: Any) -> Any:
    """Zeros on the CPU in the place of all tensors."""
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return type(outputs)(*map(_zeros_like, outputs))
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(map(_zeros_like, outputs))
    if isinstance(outputs, dict):
        return {name: _zeros_like(value) for name, value in outputs.items()}
    return torch.zeros(outputs.shape, dtype=outputs.dtype, device="cpu") if isinstance(outputs, Tensor) else outputs


def check_outputs(outputs: Any, wanted: tuple[int, ...], *, model: str, source: str) -> None:
    """Raise UserError where outputs for two rows have another shape than is wanted."""
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != wanted:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(
            "model",
            f"{model} gives {got} for 2 rows where {source} needs {wanted}",
            "its last layer must have one output a class",
        )


class SupervisedSpec(ObjectiveSpec):
    """Base of the objectives that train one net by one loss."""

    objective: ClassVar[type[Objective]]
    baselines: ClassVar[tuple[Metric, ...]] = ()  # named as the baseline's model and a metric of the objective

    @classmethod
    def known_metrics(cls) -> tuple[Metric, ...]:
        """See ObjectiveSpec."""
        return (LOSS, *cls.objective.metrics, *cls.objective.whole, *cls.baselines)

    @property
    def optional_metrics(self) -> tuple[str, ...]:
        """See ObjectiveSpec."""
        return tuple(metric.name for metric in self.objective.whole)

    def outputs(self, signature: Signature) -> tuple[int, ...] | None:
        """The shape of what a model must give for a row; None where the objective itself finds out."""
        return None

    def rehearse(self, description: ModelSpec, model: Any, signature: Signature, *, source: str) -> None:
        """See ObjectiveSpec."""
        wanted = self.outputs(signature)

        def watched(*values: Any, **named: Any) -> Any:
            outputs = model(*values, **named)
            if wanted is not None:  # before the loss, which would say less of it
                check_outputs(outputs, (2, *wanted), model=description.kind, source=source)
            return outputs

        objective: Objective = self.build(signature)
        measured = objective.measure(watched, signature.imagine(2))
        if (evidence := objective.evidence(signature)) is not None:  # not of imagined outputs: it looks at values
            with torch.device("cpu"):
                evidence.add(signature.imagine(2), _zeros_like(measured.outputs))

    def reported(self, model: ModelSpec, signature: Signature | None) -> Reported:
        """See ObjectiveSpec."""
        train = (LOSS, *self.objective.metrics)
        gathered = tuple(metric for metric in self.objective.whole if metric.name in self.gathered)
        return Reported(train, (*train, *gathered), self.objective.best)


class RowObjectiveSpec(SupervisedSpec):
    """Base of the objectives that predict a row of outputs for each row, and have metrics of whole splits."""

    takes = frozenset({"row"})
    fuses = True
    metrics: tuple[str, ...] = ()

    @property
    def gathered(self) -> tuple[str, ...]:
        """See ObjectiveSpec."""
        return self.metrics

    def outputs(self, signature: Signature) -> tuple[int, ...]:
        """See SupervisedSpec."""
        return (signature.num_outputs,)
