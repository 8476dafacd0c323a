"""Reconstruction: the row itself is the target; the plain objective of autoencoders, and the base of the others.

Shapes: B rows of the batch, D numbers of a row, K numbers of a code.
"""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from nn_models.anomaly import FOUND, NORMAL_ERROR, PCA_FOUND, anomaly_figures, with_threshold
from nn_models.batch import Batch
from nn_models.code_inspection import traversals
from nn_models.coding import Coded, CodingSpec
from nn_models.columns import Features, Image, Scale, Sequence
from nn_models.figures import Figures, Several
from nn_models.metrics import Metric, Reported
from nn_models.model import ModelSpec, reading
from nn_models.objectives import (
    Across,
    Asked,
    Baseline,
    Measured,
    Objective,
    SupervisedSpec,
    at_least_float32,
    only_here,
)
from nn_models.pca import MOST_NUMBERS, PrincipalComponents
from nn_models.reconstruction_evidence import ReconstructionEvidence
from nn_models.signature import Signature

logger = logging.getLogger(__name__)

LossName = Literal["mse", "bce", "l1"]
Values = Mapping[str, Any]  # of an objective's fields, where they are not its own

MSE = Metric("mse", "less", words="squared error a number")
ROW_ERROR = Metric("row_error", "less", words="squared error a row")
PCA_MSE = Metric("pca_mse", "less", words="squared error a number of PCA")


class Rebuilt(NamedTuple):
    """What a batch's evidence is made of: the rows again (B, *shape), at the input's scale, and their codes (B, K).

    `given` are the rows as the net was given them, where these are not the rows themselves.
    """

    again: Tensor
    codes: Tensor
    given: Tensor | None = None


class Reconstruction(Objective):
    """The net gives each row x again, as r.

        mse: loss = (1/D) sum_d (r_d - x_d)^2                       l1: loss = (1/D) sum_d |r_d - x_d|
        bce: loss = -(1/D) sum_d (x_d log p_d + (1 - x_d) log(1 - p_d)),  p = sigmoid(r)

    a row, D its numbers, as the net reads them: pixels from 0 to 1, other numbers in standard deviations. Whatever the
    loss, `mse` is the squared error a number (of p where that is what the row is given again as), and `row_error` its
    sum over a row's numbers, D times as much.
    """

    metrics: tuple[Metric, ...] = (MSE, ROW_ERROR)
    sections = ("codes",)
    whole = (*FOUND, NORMAL_ERROR)  # where the data has classes that are not trained on

    def __init__(self, *, loss: LossName) -> None:
        self.loss = loss

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Rows (B, *shape) against themselves."""
        rows, given = batch["input"], self.given(batch)
        coded: Coded = model(rows if given is None else given, **self.options)
        loss, sums = self._found(coded, rows, batch, across, {})
        again = self.again(at_least_float32(coded.outputs.detach()))
        return Measured(loss, sums, outputs=Rebuilt(again, coded.codes.detach(), given))

    def _found(self, coded: Coded, rows: Tensor, batch: Batch, across: Across, values: Values) -> tuple[Tensor, Tensor]:
        """The loss, and the sums of the metrics."""
        outputs = at_least_float32(coded.outputs)
        target, size = rows.to(outputs.dtype), rows[0].numel()
        loss = self.error(outputs, target) / size
        mse = loss.detach()
        if self.loss != "mse":
            mse = F.mse_loss(self.again(outputs.detach()), target, reduction="sum") / size
        penalty, more = self.penalty(coded, batch, across, values)
        return loss + penalty, torch.stack((mse.double(), mse.double() * size, *more))

    # -- what the other objectives do differently ------------------------------------------------------------------

    options: ClassVar[Mapping[str, bool]] = {"keep_codes": True}  # that the net is called with

    def given(self, batch: Batch) -> Tensor | None:
        """The rows (B, *shape) as the net is given them; None for as they are."""
        return None

    def penalty(
        self, coded: Coded, batch: Batch, across: Across, values: Values
    ) -> tuple[Tensor | float, list[Tensor]]:
        """What is added to the sum of the rows' errors, and sums of the metrics beside the errors."""
        return 0.0, []

    # -- fused trials: `values` are those of this objective's fields in which they differ -----------------------------

    def asks(self, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]) -> Asked:
        """See Objective."""
        return Asked(batch["input"], shared, options=self.options)

    def measure_each(
        self, outputs: Coded, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See Objective."""
        coded = {name: part for name, part in outputs._asdict().items() if part is not None}

        def one(coded: Any, rows: Tensor, values: Any) -> tuple[Tensor, Tensor]:
            return self._found(Coded(**coded), rows, batch, only_here, values)

        losses, sums = vmap(one, in_dims=(0, None if shared else 1, 0))(coded, batch["input"], dict(each))
        return losses, sums

    # -- errors ----------------------------------------------------------------------------------------------------

    def error(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of all numbers of all rows, summed."""
        if self.loss == "bce":
            return F.binary_cross_entropy_with_logits(outputs, target, reduction="sum")
        return (F.mse_loss if self.loss == "mse" else F.l1_loss)(outputs, target, reduction="sum")

    def again(self, outputs: Tensor) -> Tensor:
        """The rows again that these outputs mean."""
        return outputs.sigmoid() if self.loss == "bce" else outputs

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """See Objective: the rows again, at the scale of the input. Nothing is done to the rows that are given."""
        return self.again(at_least_float32(model(batch["input"])))

    @property
    def compared(self) -> tuple[Metric, ...]:
        """See Objective."""
        return (MSE, *FOUND)

    def baseline(self, signature: Signature, model: ModelSpec) -> Baseline | None:
        """See Objective: PCA with as many components as codes, where rows are not too long for it."""
        if not isinstance(model, CodingSpec) or signature.input_size > MOST_NUMBERS:
            return None
        return PrincipalComponents(signature.input_size, model.code, logits=self.loss == "bce")

    def figures(self, signature: Signature, *, num_rows: int | None = None) -> Figures | None:
        """See Objective: of anomalies only."""
        found = anomaly_figures(signature, num_rows)
        return Several(found) if found else None

    def evidence(self, signature: Signature) -> ReconstructionEvidence:
        """See Objective."""
        return ReconstructionEvidence()

    def inspect(self, model: Any, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """See Objective."""
        return traversals(model, self.again, signature, batch)


class RebuildingSpec(SupervisedSpec):
    """Base of the objectives of autoencoders."""

    reads = reading(input=(Features, Image, Sequence))
    shows = frozenset({"target"})
    takes = frozenset({"reconstruction"})
    fuses = True
    objective: ClassVar[type[Objective]] = Reconstruction
    baselines: ClassVar[tuple[Metric, ...]] = (PCA_MSE, *PCA_FOUND)
    loss: LossName = Field(
        "mse", description="of each number: squared error, bce (cross entropy of numbers from 0 to 1), absolute error"
    )

    @property
    def scale(self) -> Scale:
        """See ObjectiveSpec: bce is of numbers from 0 to 1 only."""
        return "bounded" if self.loss == "bce" else "pixels"

    @property
    def optional_metrics(self) -> tuple[str, ...]:
        """See ObjectiveSpec: what there is of anomalies follows from the data."""
        return ()

    def reported(self, model: ModelSpec, signature: Signature | None) -> Reported:
        """See ObjectiveSpec."""
        return with_threshold(super().reported(model, signature), signature)


class ReconstructionSpec(RebuildingSpec):
    """Give each row again by way of its code: squared error, cross entropy or absolute error."""

    kind: Literal["reconstruction"] = "reconstruction"

    def rehearse(self, description: ModelSpec, model: Any, signature: Signature, *, source: str) -> None:
        """See ObjectiveSpec. Warns of codes that are as wide as the rows: the net may learn to copy."""
        super().rehearse(description, model, signature, source=source)
        if isinstance(description, CodingSpec) and description.code >= signature.input_size:
            logger.warning(
                "model.code: %d numbers for rows of %d, so the net can copy them and learn nothing; lower it, or set "
                "objective.kind to sparse, denoising or contractive",
                description.code,
                signature.input_size,
            )

    def build(self, signature: Signature) -> Reconstruction:
        """The objective."""
        return Reconstruction(loss=self.loss)
