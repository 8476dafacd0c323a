"""Step: one optimizer step from a batch in pieces; nothing in it reads a number back from the device."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from cluster.recipe.recipe import TrainSpec
from cluster.training.average import MovingAverage
from cluster.training.carry import joined, kept, of_rows
from cluster.training.context import Context
from cluster.training.evaluation import autocast
from cluster.training.gradients import clip, total_norm
from cluster.training.journal import Pending
from nn_models.batch import Batch
from nn_models.objectives import Objective


class Step:
    """Measures, goes backward, clips, steps and averages: the gradient of the mean loss over the global batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        wrapped: nn.Module,
        train: TrainSpec,
        context: Context,
        average: MovingAverage | None,
        pending: Pending,
        carries: bool,
    ) -> None:
        """`wrapped` is the model as the context has prepared it; `pending` takes the sums.

        Where the order of rows carries nothing on, neither does a step: its rows have nothing to do with those before.
        """
        self._carries = carries
        self.model, self.wrapped, self.optimizer, self.average = model, wrapped, optimizer, average
        self._train, self._context, self._pending = train, context, pending
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.carry: Any = None  # the state that the next windows of this rank's streams go on from

    def __call__(self, pieces: Sequence[Batch], objective: Objective, *, rate_factor: float) -> None:
        """One step with so many times the learning rates."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * rate_factor
        self.optimizer.zero_grad(set_to_none=True)
        self._pending.begin([piece.place for piece in pieces])
        carried = []
        first = 0
        for number, piece in enumerate(pieces, start=1):
            last = number == len(pieces)
            with nullcontext() if last else self._context.no_sync(self.wrapped):
                carried.append(self._backward(piece, objective, first))
            first += piece.place.num_rows
        self.carry = joined(carried) if self._carries else None
        if self._train.clip_norm:
            self._pending.grad_norm = clip([*self.model.parameters()], self._train.clip_norm)
        elif self._train.record_grad_norm:
            self._pending.grad_norm = total_norm([*self.model.parameters()])
        self.optimizer.step()
        if self.average:
            self.average.update()

    def _backward(self, batch: Batch, objective: Objective, first: int) -> Any:
        """Add one piece's gradient. Returns the state that it carries on, and of how many rows."""
        place, context = batch.place, self._context
        # DDP averages over ranks: a rank's share of the sum counts world_size times
        scale = context.world_size / max(place.global_weight, 1) if place.num_rows else 0.0
        carry = of_rows(self.carry, first, place.num_rows)
        with autocast(self._train.precision, context.device):
            measured = objective.measure(self.wrapped, batch, carry=carry, across=context.sum)
        measured.loss.backward(torch.full_like(measured.loss, scale))
        if place.num_rows:  # a row that only stands in for an empty slice counts nothing
            self._pending.add(measured.loss.detach(), measured.sums, measured.counts)
        return kept(measured.carry, place.num_rows)

    def use(self, values: dict[str, Any]) -> None:
        """Go on with these values of the optimizer's groups."""
        for group in self.optimizer.param_groups:
            group.update(values)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
