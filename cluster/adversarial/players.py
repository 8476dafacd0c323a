"""Players: both halves at work for a segment of steps, in this process; the actors do the same between processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.adversarial.halves import DiscriminatorHalf, GeneratorHalf, Turn, Weights, sample, turn_of
from cluster.data.keys import digest_part
from cluster.data.loader import RowsOfRank
from cluster.recipe.recipe import Recipe
from cluster.training.checkpoints import to_cpu
from cluster.training.memory import keep_freed_memory
from cluster.training.splits import Splits

# What a step adds up over its rows. `generator_rows` are those of the steps in which the generator learned.
SUMS = ("rows", "discriminator", "real_right", "fake_right", "generator_rows", "generator", "l1")
ROWS, DISCRIMINATOR, REAL_RIGHT, FAKE_RIGHT, GENERATOR_ROWS, GENERATOR, L1 = range(len(SUMS))

State = dict[str, Any]


@dataclass(frozen=True)
class Played:
    """What came of a segment: the SUMS of each of its intervals, (intervals, sums) float64, and a part of the digest.

    Parts of several players add up.
    """

    sums: NDArray[np.float64]
    digest: NDArray[np.int64]


class PlayersLost(Exception):
    """The process of a half has died; the others have been ended."""


class PlayersWarned(Exception):
    """The process of a half is about to be ended; all has been saved."""


class Players(Protocol):
    """A generator and a discriminator, wherever they are. Every method may raise PlayersLost."""

    def play(self, first_step: int, num_steps: int, rate: float) -> Played:
        """So many steps from `first_step` on, with `rate` times the recipe's learning rates."""

    def sample(self, source: Tensor, condition: Tensor | None, *, weights: Weights) -> Tensor:
        """Rows (rows, *input_shape) that the generator makes of noise and conditions, on the CPU."""

    def state(self) -> State:
        """Both halves as one unit, on the CPU."""

    def load(self, state: State) -> None:
        """Go on from there."""

    def kept(self, weights: Weights) -> dict[str, Tensor]:
        """The weights that a run keeps, as those of `nn_models.adversarial.Halves`: these of the generator."""

    def warned(self) -> str | None:
        """Why the halves are to be started elsewhere soon, in words; None where they are not."""

    def close(self) -> None:
        """Leave no process behind."""


class Segment:
    """The turns of a segment, which may run over the end of an epoch, and what has been added up in them.

    The sums of every `log_every_steps` steps are kept apart; steps are counted from the beginning of training, so that
    the intervals are the same wherever a segment begins. They stay on the device until `played`.
    """

    def __init__(
        self, recipe: Recipe, rows: RowsOfRank, *, first_step: int, num_steps: int, rate: float, device: torch.device
    ) -> None:
        self._recipe, self._rows, self._rate = recipe, rows, rate
        self._first, self._end = first_step, first_step + num_steps
        ends = interval_ends(recipe, first_step, num_steps)
        self._interval = np.searchsorted(ends, np.arange(first_step, self._end), side="right")
        self._sums = torch.zeros(len(ends), len(SUMS), dtype=torch.float64, device=device)
        self._cells = [row.unbind() for row in self._sums.unbind()]
        self._digest = np.zeros(2, np.int64)

    def __iter__(self) -> Iterator[Turn]:
        order = self._rows.order
        num_steps = order.num_steps * self._recipe.train.epochs
        step = self._first
        while step < self._end:
            epoch, epoch_step = divmod(step, order.num_steps)
            for (batch,) in self._rows.batches(epoch, epoch_step):
                turn = turn_of(
                    self._recipe,
                    batch,
                    step=step,
                    batch_start=order.start(epoch, step % order.num_steps, 0, 1),
                    factor=self._rate * self._recipe.schedule.factor(step, num_steps),
                )
                self._digest += digest_part(batch.place.ids, batch.place.start)
                yield turn
                step += 1
                if step == self._end:
                    return

    def add(self, turn: Turn, column: int, value: Tensor | float) -> None:
        """Add to one of the SUMS of the turn's interval."""
        self._cells[self._interval[turn.step - self._first]][column].add_(value)

    def played(self) -> Played:
        """All of it."""
        return Played(self._sums.cpu().numpy(), self._digest)


def interval_ends(recipe: Recipe, first_step: int, num_steps: int) -> list[int]:
    """The steps, counted from the beginning of training, after which a line of metrics is due in a segment."""
    every, end = recipe.train.log_every_steps, first_step + num_steps
    return [*range(first_step - first_step % every + every, end, every), end]


class LocalPlayers:
    """Both halves in this process, in the order and with the random streams of the actors."""

    def __init__(self, recipe: Recipe, splits: Splits, *, device: torch.device) -> None:
        keep_freed_memory(device)
        self._recipe, self._device = recipe, device
        signature = splits.manifest.signature
        self.generator = GeneratorHalf(recipe, signature, device=device, reduce=alone)
        self.discriminator = DiscriminatorHalf(recipe, signature, device=device, reduce=alone)
        self._rows = splits.training(recipe, rank=0, world_size=1, device=device)

    def play(self, first_step: int, num_steps: int, rate: float) -> Played:
        """See Players."""
        segment = Segment(
            self._recipe, self._rows, first_step=first_step, num_steps=num_steps, rate=rate, device=self._device
        )
        waiting: Tensor | None = None  # the gradient of the turn before, where the generator runs ahead
        for turn in segment:
            fake = self.generator.make(turn)
            if waiting is not None:
                learn(self.generator, segment, waiting)
            waiting = take_turn(self.discriminator, segment, turn, lambda made=fake: made)  # type: ignore[misc]
            if waiting is not None and not self.generator.runs_ahead:
                learn(self.generator, segment, waiting)
                waiting = None
        if waiting is not None:  # a segment ends with both halves at the same step
            learn(self.generator, segment, waiting)
        return segment.played()

    def sample(self, source: Tensor, condition: Tensor | None, *, weights: Weights) -> Tensor:
        """See Players."""
        return sample(self.generator.weights(weights), source, condition, device=self._device)

    def state(self) -> State:
        """See Players."""
        return to_cpu({"generator": self.generator.state(), "discriminator": self.discriminator.state()})

    def load(self, state: State) -> None:
        """See Players."""
        self.generator.load(state["generator"])
        self.discriminator.load(state["discriminator"])

    def kept(self, weights: Weights) -> dict[str, Tensor]:
        """See Players."""
        return as_halves(self.generator.weights(weights).state_dict(), self.discriminator.module.state_dict())

    def warned(self) -> str | None:
        """See Players."""
        return None

    def close(self) -> None:
        """See Players."""


def learn(half: GeneratorHalf, segment: Segment, gradient: Tensor) -> None:
    """The generator's side of a turn, once the gradient for the oldest rows that it made has come."""
    turn, distance = half.learn(gradient)
    if distance is not None:
        segment.add(turn, L1, distance)


def take_turn(half: DiscriminatorHalf, segment: Segment, turn: Turn, fake: Callable[[], Tensor]) -> Tensor | None:
    """The discriminator's side of a turn. `fake` is called once the made rows are needed; returns dL_G/dfake."""
    rows = len(turn.real) if turn.counts else 0
    segment.add(turn, ROWS, rows)
    loss, right = half.see_real(turn)
    segment.add(turn, DISCRIMINATOR, loss)
    segment.add(turn, REAL_RIGHT, right)
    made = fake()
    loss, right = half.see_fake(turn, made)
    segment.add(turn, DISCRIMINATOR, loss)
    segment.add(turn, FAKE_RIGHT, right)
    if not turn.generator_learns:
        return None
    gradient, loss = half.judge(turn, made)
    segment.add(turn, GENERATOR_ROWS, rows)
    segment.add(turn, GENERATOR, loss)
    return gradient


def as_halves(generator: dict[str, Tensor], discriminator: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both state dicts as that of `nn_models.adversarial.Halves`, on the CPU."""
    both = {"generator": generator, "discriminator": discriminator}
    weights = {f"{half}.{name}": tensor for half, state in both.items() for name, tensor in state.items()}
    copied: dict[str, Tensor] = to_cpu(weights)
    return copied


def alone(tensors: Sequence[Tensor]) -> None:
    """The sum over the replicas where there is one."""
