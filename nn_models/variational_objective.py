"""The variational objective: the evidence lower bound of a row's likelihood, in nats.

Shapes: B rows of the batch, N rows of the global batch, D numbers of a row, K numbers of a code.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from nn_models.anomaly import FOUND, NORMAL_ERROR, anomaly_figures, with_threshold
from nn_models.batch import Batch
from nn_models.code_inspection import traversals
from nn_models.columns import Features, Image
from nn_models.figures import Figures, Several
from nn_models.metrics import Metric, Reported
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across, Asked, Measured, Objective, SupervisedSpec, at_least_float32, only_here
from nn_models.reconstruction import MSE
from nn_models.reconstruction_evidence import ReconstructionEvidence
from nn_models.signature import Signature
from nn_models.sparse import of_mean
from nn_models.variational import Inferred

NATS = (
    Metric("negative_elbo", "less", words="-ELBO in nats", short="-ELBO"),
    Metric("reconstruction_nats", "less", words="-log p(x | z) in nats"),
    Metric("kl_nats", words="KL of the code in nats"),
)
BOUND = Metric("negative_bound", "less", words="-log p(x) in nats, by importance weighting")


class Bounded(NamedTuple):
    """What a batch's evidence and figures are made of: see Rebuilt; `log_bound` (B,) in evaluation."""

    again: Tensor
    codes: Tensor
    given: None
    log_bound: Tensor | None


class Variational(Objective):
    """Minus the evidence lower bound (Kingma & Welling 2014, eq. 3), in nats a row, summed over its numbers.

        loss = -log p(x | z) + beta KL(q(z | x) || p(z)),   z drawn once from q
        KL = 1/2 sum_k (mu_k^2 + sigma_k^2 - 1 - log sigma_k^2)

    `beta` is 1 for the bound itself (Higgins et al. 2017). With `free_bits` f a unit's KL, as its mean over the global
    batch, costs nothing below f nats (Kingma et al. 2016, eq. 15). The metrics know neither: `negative_elbo` is
    `reconstruction_nats` + `kl_nats`. `negative_bound`, of validation and test, is that of importance weighting with so
    many `samples` (Burda et al. 2016), which is nearer to -log p(x).
    """

    metrics = (*NATS, MSE)
    sections = ("codes",)
    whole = (BOUND, *FOUND, NORMAL_ERROR)

    def __init__(self, *, beta: float, free_bits: float, samples: int) -> None:
        self.beta, self.free_bits, self.samples = beta, free_bits, samples

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Rows (B, *shape) against themselves."""
        rows = batch["input"]
        inferred: Inferred = model(rows, batch.keys, samples=self.samples, **_label(batch))
        loss, sums = self._found(inferred, batch, across, self.beta)
        seen = Bounded(inferred.outputs.detach(), inferred.mean.detach(), None, inferred.log_bound)
        return Measured(loss, sums, outputs=seen)

    def _found(self, inferred: Inferred, batch: Batch, across: Across, beta: float | Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the sums of the metrics."""
        rows = batch["input"]
        kl = divergence(inferred.mean, inferred.log_variance)  # (B, K)
        missing = -inferred.log_likelihood
        counted = of_mean(kl, self._free, batch, across) if self.free_bits else kl.sum()
        given, code = missing.detach().sum(dtype=torch.float64), kl.detach().sum(dtype=torch.float64)
        mse = F.mse_loss(inferred.outputs.detach(), rows, reduction="sum").double() / rows[0].numel()
        return missing.sum() + beta * counted, torch.stack((given + code, given, code, mse))

    def asks(self, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]) -> Asked:
        """See Objective: the same noise for all trials."""
        assert shared  # trials of several seeds are not fused: see ObjectiveSpec.draws
        return Asked(batch["input"], True, {"keys": batch.keys})

    def measure_each(
        self, outputs: Inferred, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See Objective."""
        parts = {name: part for name, part in outputs._asdict().items() if part is not None}
        betas = each.get("beta", outputs.mean.new_full((len(outputs.mean),), self.beta))

        def one(parts: Any, beta: Tensor) -> tuple[Tensor, Tensor]:
            return self._found(Inferred(**{"log_bound": None, **parts}), batch, only_here, beta)

        losses, sums = vmap(one)(parts, betas)
        return losses, sums

    def _free(self, means: Tensor) -> Tensor:
        return means.clamp(min=self.free_bits).sum()

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """See Objective: the mean of p(x | z), z the mean of q(z | x)."""
        outputs: Tensor = model(batch["input"], **_label(batch))
        return at_least_float32(outputs)

    def again(self, outputs: Tensor) -> Tensor:
        """The rows again that these outputs of a decoder mean."""
        return outputs

    def figures(self, signature: Signature, *, num_rows: int | None = None) -> Figures | None:
        """See Objective: at each validation too."""
        found = [*([BoundFigures()] if self.samples else []), *anomaly_figures(signature, num_rows)]
        return Several(found) if found else None

    def evidence(self, signature: Signature) -> ReconstructionEvidence:
        """See Objective: codes are the means of q."""
        return ReconstructionEvidence()

    def inspect(self, model: Any, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """See Objective."""
        told = _label(batch) if getattr(model, "num_classes", 0) else {}
        return traversals(model, self.again, signature, batch, **told)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each number, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def _label(batch: Batch) -> dict[str, Tensor]:
    """What a net that is told of classes wants to know; others take no notice of it."""
    return {"label": batch["target"]} if "target" in batch else {}


class BoundFigures:
    """The importance-weighted bound of a split: the mean over its rows."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0

    def add(self, batch: Batch, outputs: Bounded) -> None:
        """See Figures."""
        assert outputs.log_bound is not None  # in evaluation
        missing = -outputs.log_bound.sum(dtype=torch.float64)
        self._sum = missing if self._sum is None else self._sum + missing
        self._rows += len(outputs.log_bound)

    def values(self, across: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """See Figures."""
        own = torch.zeros((), dtype=torch.float64, device=device) if self._sum is None else self._sum
        total, rows = across(torch.stack((own, own.new_tensor(float(self._rows))))).tolist()
        return {BOUND.name: total / rows}


class VariationalSpec(SupervisedSpec):
    """Maximise a lower bound of each row's likelihood: what it costs to give the row again, and what its code costs."""

    reads = reading(input=(Features, Image))
    shows = frozenset({"target"})
    takes = frozenset({"posterior"})
    objective = Variational
    draws = True
    fuses = True
    kind: Literal["variational"] = "variational"
    beta: NonNegativeFloat = Field(1.0, description="how often the code's KL counts; 1 for the bound itself")
    free_bits: NonNegativeFloat = Field(0.0, description="nats of each unit's mean KL that cost nothing")
    samples: NonNegativeInt = Field(
        50, le=5000, description="of the importance-weighted bound in validation and test; 0 to leave it out"
    )

    @property
    def gathered(self) -> tuple[str, ...]:
        """See ObjectiveSpec."""
        return (BOUND.name,) if self.samples else ()

    @property
    def optional_metrics(self) -> tuple[str, ...]:
        """See ObjectiveSpec: what there is of anomalies follows from the data."""
        return (BOUND.name,)

    def reported(self, model: ModelSpec, signature: Signature | None) -> Reported:
        """See ObjectiveSpec."""
        return with_threshold(super().reported(model, signature), signature)

    def build(self, signature: Signature) -> Variational:
        """The objective."""
        return Variational(beta=self.beta, free_bits=self.free_bits, samples=self.samples)
