"""Evaluation: exact metrics of a split over all ranks, and the evidence that a report shows."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cluster.data.loader import RowsOfRank
from cluster.recipe.recipe import Recipe
from cluster.training.carry import kept, of_rows
from cluster.training.checkpoints import packed, read_model
from cluster.training.context import Context
from cluster.training.progress import means
from cluster.training.run_directory import EVALUATION
from nn_models.batch import Batch
from nn_models.evidence import Evidence
from nn_models.figures import Figures
from nn_models.metrics import LOSS
from nn_models.objectives import INSPECTED_ROWS, Measured, Objective


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The recipe's precision; entering it costs nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def names_of(objective: Objective) -> tuple[str, ...]:
    """The loss, and the objective's metrics."""
    return (LOSS.name, *(metric.name for metric in objective.metrics))


class Totals:
    """Sums of the loss and of metrics over batches, in float64, and what they count."""

    def __init__(self, num_metrics: int, device: torch.device) -> None:
        """`num_metrics` beside the loss."""
        self._size = 1 + num_metrics
        self._weight, self._counted = 0.0, False
        self._sums = torch.zeros(2 * self._size, dtype=torch.float64, device=device)

    def add(self, weight: float, measured: Measured) -> None:
        """Take in a batch that counts so much. Nothing is read back."""
        size = self._size
        self._weight += weight
        self._sums[0] += measured.loss
        self._sums[1:size] += measured.sums
        if measured.counts is not None:
            self._counted = True
            self._sums[size] += weight
            self._sums[size + 1 :] += measured.counts

    def means(self, across: Callable[[Tensor], Tensor]) -> list[float]:
        """Of the loss and the metrics, over all ranks; called by all."""
        own = torch.cat((self._sums.new_tensor([self._weight, self._counted]), self._sums))
        total, has_counts, *totals = across(own).tolist()
        return means(totals[: self._size], total, totals[self._size :] if has_counts else None)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: RowsOfRank,
    objective: Objective,
    *,
    context: Context,
    precision: str,
    figures: Figures | None = None,
    evidence: Evidence | None = None,
) -> dict[str, float]:
    """`loss` and the objective's metrics: means over all rows of all ranks, from reduced sums and counts; and figures.

    Called by all ranks: each goes through the same steps, with a row that counts nothing where it has none.
    """
    training = model.training
    model.eval()
    totals = Totals(len(objective.metrics), context.device)
    carry: Any = None
    for (batch,) in rows.batches(0):
        place = batch.place
        with autocast(precision, context.device):
            given = of_rows(carry, 0, place.num_rows)
            measured = objective.measure(model, batch, carry=given, across=context.sum)
        carry = kept(measured.carry, place.num_rows) if rows.order.carries else None
        if not place.num_rows:
            continue
        totals.add(place.weight, measured)
        for whole in (figures, evidence):
            if whole is not None:
                whole.add(batch, measured.outputs)
    model.train(training)
    found = totals.means(context.sum)
    gathered = figures.values(context.sum, context.device) if figures is not None else {}
    return dict(zip(names_of(objective), found, strict=True)) | gathered


def evaluate_best(
    model: nn.Module, objective: Objective, *, recipe: Recipe, context: Context
) -> dict[str, float] | None:
    """Evaluate the best weights of the context's run, loaded into `model`, on the test split.

    Returns None where there is no such split; puts evaluation.safetensors into the run's directory.
    """
    place = {"rank": context.rank, "world_size": context.world_size}
    rows = context.splits.evaluation("test", recipe, device=context.device, **place)
    if rows is None:
        return None
    model.load_state_dict(read_model(context.run).weights)
    manifest = context.splits.manifest
    evidence = objective.evidence(manifest.signature)
    precision = recipe.train.precision
    figures = objective.figures(manifest.signature, num_rows=rows.order.num_rows)
    tested = evaluate(model, rows, objective, context=context, precision=precision, figures=figures, evidence=evidence)
    compared, beside = _baselines(objective, rows, recipe=recipe, context=context)
    tested |= compared
    tensors = evidence.tensors(context.sum, context.device, context.gather) if evidence is not None else {}
    if context.rank == 0:
        tensors |= {**beside, **_inspected(model, objective, recipe=recipe, context=context)}
        inside = [*objective.sections, *recipe.model.sections]
        about = {"split": "test", "class_names": json.dumps(manifest.class_names), "inside": json.dumps(inside)}
        about |= {"section": evidence.section} if evidence is not None else {}
        about["signature"] = manifest.signature.model_dump_json()
        write_evidence(context, tensors, about)
    return tested


def _inspected(model: nn.Module, objective: Objective, *, recipe: Recipe, context: Context) -> dict[str, Tensor]:
    """What model and objective show of the first rows of the test."""
    signature = context.splits.manifest.signature

    def first(num: int) -> Batch:
        return context.splits.first("test", recipe, num, device=context.device)

    few, rows = first(INSPECTED_ROWS), first(objective.inspected_rows(signature))
    model.eval()
    # a few rows of other shapes are not worth compiling the model anew
    with torch.compiler.set_stance("force_eager"):
        return {**recipe.model.inspect(model, signature, few), **objective.inspect(model, signature, rows)}


def _baselines(
    objective: Objective, rows: RowsOfRank, *, recipe: Recipe, context: Context
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The metrics, on these rows, of what needs no training to speak of: `mean_mse`, `linear_mae`; and its tensors."""
    baseline = objective.baseline(context.splits.manifest.signature, recipe.model)
    if baseline is None:
        return {}, {}
    place = {"rank": context.rank, "world_size": context.world_size}
    train = context.splits.training(recipe, device=context.device, **place)
    for (batch,) in train.batches(0):
        if batch.place.num_rows:
            baseline.add(batch)
    found: dict[str, float] = {}
    beside: dict[str, Tensor] = {}
    signature, whole = context.splits.manifest.signature, set(objective.compared) & set(objective.whole)
    for name, model in baseline.models(context.sum, context.device).items():
        figures = objective.figures(signature, num_rows=rows.order.num_rows) if whole else None
        metrics = evaluate(model, rows, objective, context=context, precision="fp32", figures=figures)
        known = [metric.name for metric in objective.compared if metric.name in metrics]
        found |= {f"{name}_{metric}": metrics[metric] for metric in known}
        beside |= {f"{name}.{key}": values.cpu() for key, values in model.state_dict().items()}
    return found, beside


def write_evidence(context: Context, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Put evaluation.safetensors into the run's directory."""
    context.run.write_bytes(EVALUATION, packed(dict(tensors), about))
