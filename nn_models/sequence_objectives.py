"""Objectives of sequences: a label for each step, and the next token.

Shapes: B rows of the batch, N steps of all rows, C classes or words.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from nn_models.batch import Batch, Ragged
from nn_models.columns import Labels, Tokens
from nn_models.errors import UserError
from nn_models.evidence import Evidence
from nn_models.likeliest import likeliest
from nn_models.metrics import Metric
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across, Measured, Objective, SupervisedSpec, at_least_float32, only_here
from nn_models.sequence_evidence import StepEvidence, bits_of_steps, first_token, written
from nn_models.signature import Signature

TEMPERATURES = (0.5, 0.8, 1.0)  # at which a test writes, with the seed 0
WRITTEN = 300  # tokens at each
PASSAGE = (8, 128)  # windows of the test, and tokens of each, whose bits are kept


def step_labels(batch: Batch) -> Tensor:
    """(N,) int64: the labels of all steps, row after row."""
    labels = batch["target"]
    values: Tensor = labels.values if isinstance(labels, Ragged) else labels.flatten()
    return values.long()


class StepLabels(Objective):
    """A class for each step of a row: cross entropy and accuracy, both of steps and not of rows.

    loss = -sum_t log softmax(y[t])[label of t]
    """

    metrics = (Metric("accuracy", "more"),)
    best = "accuracy"

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Outputs (N, C) against labels (N,)."""
        outputs, labels = model(batch["input"]), step_labels(batch)
        loss = F.cross_entropy(at_least_float32(outputs), labels, reduction="sum")
        right = (likeliest(outputs) == labels).sum(0, keepdim=True, dtype=torch.float64)
        return Measured(loss, right, outputs=outputs.detach())

    def evidence(self, signature: Signature) -> Evidence:
        """See Objective."""
        return StepEvidence(signature["target"].num_outputs)

    def predicted(self, outputs: Tensor) -> Tensor:
        """See Objective: (N,) of outputs (N, C), row after row."""
        return likeliest(outputs)


class NextToken(Objective):
    """Language model: the next token, from all that came before it in the text.

        loss = -sum_t log p(x[t+1] | x[1] ... x[t])        bits a token = loss / ln 2

    The state at the end of a window is what the next window of the same stream goes on from, and its derivative ends
    there: truncated backpropagation through time (Williams & Peng 1990). Without `carry_state` each window begins anew.
    """

    metrics = (Metric("bits_per_token", "less"), Metric("accuracy", "more"))
    last_says = True
    sections: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, *, carry_state: bool) -> None:
        self.carry_state = carry_state

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """Outputs (N, words) against the tokens that follow (N,); what is carried on are the net's states."""
        outputs, state = model(batch["input"], carry if self.carry_state else None, keep_state=True)
        following = step_labels(batch)
        loss = F.cross_entropy(at_least_float32(outputs), following, reduction="sum")
        right = (likeliest(outputs) == following).sum(dtype=torch.float64)
        sums = torch.stack((loss.detach().double() / math.log(2), right))
        kept = tuple(part.detach() for part in state) if self.carry_state else None
        return Measured(loss, sums, carry=kept)

    def outputs(self, model: Any, batch: Batch) -> Any:
        """See Objective."""
        return model(batch["input"])

    def inspect(self, model: Any, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """See Objective: what the model writes, and windows of the test with the bits that each token costs.

        text/temperatures (K,); text/written (K, WRITTEN) int32, as `manta generate --seed 0` has them; and of windows
        of one length text/following (B, T) int32 and text/bits (B, T).
        """
        column, words = signature["input"], batch["input"]
        assert isinstance(column, Tokens)
        device = (words.values if isinstance(words, Ragged) else words).device
        start = torch.tensor([first_token(column)], device=device)
        drawn = [
            list(written(model, start, WRITTEN, temperature=value, generator=torch.Generator().manual_seed(0)))
            for value in TEMPERATURES
        ]
        found = {
            "text/temperatures": torch.tensor(TEMPERATURES),
            "text/written": torch.tensor(drawn, dtype=torch.int32),
        }
        if isinstance(words, Tensor):
            rows, steps = PASSAGE
            following = step_labels(batch).view(words.shape)[:rows, :steps]
            found["text/following"] = following.int().cpu()
            found["text/bits"] = bits_of_steps(model, words[:rows, :steps], following).cpu()
        return found


class _StepsSpec(SupervisedSpec):
    """Base of the objectives that look at each step."""

    reads = reading(target=Labels)
    takes = frozenset({"elements"})
    counts = "input"

    def check_data(self, signature: Signature, *, source: str) -> None:
        """See ObjectiveSpec."""
        super().check_data(signature, source=source)
        target = signature["target"]
        if isinstance(target, Labels) and target.of != "input":
            raise UserError(
                "objective.kind",
                f"{self.kind} needs labels of the input's steps, but those of {source} are of {target.of}",
            )


class StepLabelsSpec(_StepsSpec):
    """Predict a class for each step of a sequence."""

    objective = StepLabels
    kind: Literal["step_labels"] = "step_labels"

    def build(self, signature: Signature) -> StepLabels:
        """The objective."""
        return StepLabels()


class NextTokenSpec(_StepsSpec):
    """Predict the next token of a text."""

    reads = reading(input=Tokens, target=Labels)
    objective = NextToken
    writes = True
    kind: Literal["next_token"] = "next_token"
    carry_state: bool = Field(
        True, description="a window of a text goes on from the state at the end of the one before"
    )

    def check(self, model: ModelSpec) -> None:
        """See ObjectiveSpec."""
        super().check(model)
        if model.sees_ahead:
            raise UserError(
                "objective.kind",
                f"{model.kind} reads each text from its end as well, so it has seen the next token",
                "set model.bidirectional to false",
            )

    def build(self, signature: Signature) -> NextToken:
        """The objective."""
        return NextToken(carry_state=self.carry_state)
