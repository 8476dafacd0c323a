"""Rehearsal: imaginary rows go through the objective itself, whatever it keeps of its outputs."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nn_models.evidence import Evidence
from nn_models.feedforward import MLPSpec
from nn_models.objectives import Measured, Objective, SupervisedSpec
from nn_models.signature import Signature


class Codes(NamedTuple):
    codes: Tensor
    rebuilt: Tensor


class Seen:
    """Evidence that says what it was given."""

    section = "classes"
    outputs: Any = None

    def add(self, batch, outputs) -> None:
        Seen.outputs = outputs

    def tensors(self, across, device) -> dict[str, Tensor]:
        return {}


class Kept(Objective):
    """Keeps its outputs in the shape that it was told."""

    def __init__(self, keep) -> None:
        self.keep = keep

    def measure(self, model, batch, *, carry=None, across=lambda values: values) -> Measured:
        outputs = model(batch["input"])
        loss = outputs.sum()
        return Measured(loss, loss.new_zeros(0, dtype=torch.float64), outputs=self.keep(outputs.detach()))

    def evidence(self, signature) -> Evidence:
        return Seen()


@pytest.mark.parametrize(
    "keep",
    [lambda y: Codes(y, y), lambda y: (y, [y]), lambda y: {"y": y, "k": 3}, lambda y: y],
    ids=["named", "nested", "dict", "plain"],
)
def test_evidence_is_rehearsed_with_outputs_of_the_same_structure(keep):
    class KeptSpec(SupervisedSpec):
        kind: str = "kept"

        def build(self, signature):
            return Kept(keep)

    signature = Signature(input_shape=(4,), num_outputs=3)
    with torch.device("meta"):
        KeptSpec().rehearse(MLPSpec(), nn.Linear(4, 3), signature, source="made")
    wanted = keep(torch.zeros(2, 3))
    assert type(Seen.outputs) is type(wanted)
    leaves, expected = torch.utils._pytree.tree_leaves(Seen.outputs), torch.utils._pytree.tree_leaves(wanted)
    for leaf, value in zip(leaves, expected, strict=True):
        assert torch.equal(leaf, value) if isinstance(value, Tensor) else leaf == value
