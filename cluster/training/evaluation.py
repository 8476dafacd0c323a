"""Evaluation: exact metrics of a split over all ranks, and the evidence that a report shows."""

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cluster.data.loader import HeldRows
from cluster.storage import Folder
from cluster.training.checkpoints import read_model
from cluster.training.context import Context
from cluster.training.run_directory import EVALUATION
from nn_models.objectives import Classification, Objective

EVALUATION_ROWS = 500  # of a batch in evaluation, where nothing is kept for a backward pass
NUM_EXAMPLES = 24  # right ones, and as many wrong ones
MAX_CONFUSION_CLASSES = 1000  # of 100,000 classes the matrix would take 80 GB


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The recipe's precision; entering it costs nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: HeldRows,
    objective: Objective,
    *,
    context: Context,
    precision: str,
    batch_size: int,
    evidence: "Evidence | None" = None,
) -> dict[str, float]:
    """`loss` and the objective's metrics: means over all rows of all ranks, from reduced sums and counts."""
    training = model.training
    model.eval()
    sums = torch.zeros(2 + len(objective.names), dtype=torch.float64, device=context.device)
    for stored, inputs, targets in rows.pass_over(batch_size, rank=context.rank, world_size=context.world_size):
        with autocast(precision, context.device):
            measured = objective.measure(model, inputs, targets)
        sums[0] += len(targets)
        sums[1] += measured.loss
        sums[2:] += objective.sums(measured, targets)
        if evidence:
            evidence.add(stored, measured.outputs, targets)
    model.train(training)
    count, *totals = context.reduce_sums(sums).tolist()
    return {name: total / count for name, total in zip(("loss", *objective.names), totals, strict=True)}


def evaluate_best(
    model: nn.Module, objective: Objective, *, context: Context, precision: str
) -> dict[str, float] | None:
    """Evaluate the best weights of the context's run, loaded into `model`, on the test split.

    Returns None where there is no such split; puts evaluation.safetensors into the run's directory.
    """
    test = context.splits.held("test", context.device)
    if test is None:
        return None
    model.load_state_dict(read_model(context.run).weights)
    evidence = Evidence(objective, context.device)
    tested = evaluate(
        model,
        test,
        objective,
        context=context,
        precision=precision,
        batch_size=EVALUATION_ROWS,
        evidence=evidence,
    )
    evidence.write(context.run, context=context, split="test", class_names=context.splits.manifest.class_names)
    return tested


class Evidence:
    """The confusion matrix over all ranks, and examples of right and wrong predictions from this one."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self._objective = objective
        self._confusion: Tensor | None = None
        if isinstance(objective, Classification) and objective.num_classes <= MAX_CONFUSION_CLASSES:
            size = objective.num_classes
            self._confusion = torch.zeros(size, size, dtype=torch.int64, device=device)
        self._examples: list[dict[str, Tensor]] = []
        self._wanted = {True: NUM_EXAMPLES, False: NUM_EXAMPLES}

    def add(self, stored: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch: inputs as stored, the model's outputs, targets."""
        if not isinstance(self._objective, Classification):
            self._keep(torch.arange(len(targets)), True, stored, targets, outputs, None)
            return
        if self._confusion is not None:
            self._confusion += self._objective.confusion(outputs, targets)
        if any(self._wanted.values()):
            predictions, confidences = self._objective.confidence(outputs)
            right = predictions == targets
            for kind in (True, False):
                where = (right if kind else ~right).nonzero()[:, 0].cpu()
                self._keep(where, kind, stored, targets, predictions, confidences)

    def _keep(
        self,
        where: Tensor,
        kind: bool,
        stored: Tensor,
        targets: Tensor,
        predictions: Tensor,
        confidences: Tensor | None,
    ) -> None:
        where = where[: self._wanted[kind]]
        self._wanted[kind] -= len(where)
        if len(where):
            columns = {"inputs": stored, "targets": targets, "predictions": predictions}
            if confidences is not None:
                columns["confidences"] = confidences.float()
            self._examples.append({name: column[where.to(column.device)].cpu() for name, column in columns.items()})

    def write(self, folder: Folder, *, context: Context, split: str, class_names: tuple[str, ...]) -> None:
        """Put evaluation.safetensors into the folder; called by all ranks, written by rank 0."""
        content: dict[str, Tensor] = {}
        if self._confusion is not None:
            content["confusion"] = context.reduce_sums(self._confusion).cpu()
        for name in self._examples[0] if self._examples else ():
            content[f"example_{name}"] = torch.cat([example[name] for example in self._examples]).contiguous()
        if context.rank == 0:
            metadata = {"class_names": json.dumps(class_names), "split": split}
            folder.write_bytes(EVALUATION, save(content, metadata))
