"""Halves: the generator and the discriminator of a GAN, each with its own parameters and optimizer only.

One exact step, whoever calls it (Goodfellow et al. 2014, algorithm 1, with one batch for both players):

    1. fake = generator.make(turn)                         overlaps with discriminator.see_real(turn)
    2. discriminator.see_fake(turn, fake)                  and steps
    3. gradient = discriminator.judge(turn, fake)          dL_G/dfake, from the stepped discriminator
    4. generator.learn(turn, gradient)                     and steps

All randomness of a step is a function of (seed, step): a half can be stopped and started anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cluster.recipe.adversarial import AdversarialTrainSpec
from cluster.recipe.optimizers import AnyOptimizerSpec
from cluster.recipe.recipe import Recipe
from cluster.training.average import MovingAverage
from cluster.training.evaluation import autocast
from nn_models.adversarial import AdversarialSpec
from nn_models.adversarial_losses import AdversarialObjectiveSpec
from nn_models.batch import Batch
from nn_models.pix2pix import DropoutNoise
from nn_models.signature import Signature

# Sums tensors over a half's replicas, in place; nothing to do for one.
Reduce = Callable[[Sequence[Tensor]], None]
Weights = Literal["averaged", "plain"]  # of the generator, where a moving average of them is kept

GENERATOR, DISCRIMINATOR, NOISE, PENALTY = range(4)  # streams of random numbers
SAMPLE_ROWS = 500  # made at once where nothing is kept for a backward pass


def described(recipe: Recipe) -> tuple[AdversarialSpec, AdversarialObjectiveSpec, AdversarialTrainSpec]:
    """The sections of a recipe that has two halves."""
    model, objective, adversarial = recipe.model, recipe.objective, recipe.adversarial
    assert isinstance(model, AdversarialSpec)
    assert isinstance(objective, AdversarialObjectiveSpec)
    assert adversarial is not None
    return model, objective, adversarial


@dataclass(frozen=True)
class Turn:
    """What both halves know of one step: the replica's slice of the global batch."""

    step: int
    real: Tensor  # (rows, *input_shape); images in [-1, 1]
    condition: Tensor | None  # what is given beside the noise: labels, or the images to start from
    first: int  # position of the slice in the global batch
    global_rows: int
    counts: bool  # False where a row only stands in for an empty slice
    factor: float  # of the learning rates
    generator_learns: bool  # only every discriminator_steps-th step

    @property
    def share(self) -> float:
        """What a row's loss counts in the mean over the global batch."""
        return 1 / self.global_rows if self.counts else 0.0


def turn_of(recipe: Recipe, batch: Batch, *, step: int, batch_start: int, factor: float) -> Turn:
    """What a batch means to both halves. `batch_start` is the position in the epoch of the global batch's first row."""
    model, objective, _ = described(recipe)
    place = batch.place
    return Turn(
        step=step,
        real=batch["input"],
        condition=batch[model.given] if model.given else None,
        first=place.start - batch_start,
        global_rows=place.global_rows,
        counts=place.num_rows > 0,
        factor=factor,
        generator_learns=(step + 1) % objective.discriminator_steps == 0,
    )


def seed_of(seed: int, stream: int, *place: int) -> int:
    """A seed for torch, different for each stream of random numbers and place in it."""
    return int(np.random.SeedSequence([seed, stream, *place]).generate_state(1, np.uint64)[0] >> 1)


def noise(seed: int, turn: Turn, size: int) -> Tensor:
    """(rows, size) standard normal numbers: the slice of those of the global batch, whatever the number of replicas."""
    stream = torch.Generator().manual_seed(seed_of(seed, NOISE, turn.step))
    rows = len(turn.real)
    first = min(turn.first, turn.global_rows - rows)  # a stand-in may come after the last row
    return torch.randn(turn.global_rows, size, generator=stream)[first : first + rows]


class _Half:
    """What both halves have in common."""

    stream: int

    def __init__(
        self,
        recipe: Recipe,
        signature: Signature,
        module: nn.Module,
        optimizer: AnyOptimizerSpec,
        *,
        device: torch.device,
        reduce: Reduce,
    ) -> None:
        self.train = recipe.train
        self.device = device
        self.module = module.to(device)
        if recipe.train.compile:
            self.module.compile()
        self.parameters: list[Tensor] = list(self.module.parameters())
        self.optimizer = optimizer.build(self.module.parameters())
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.objective = described(recipe)[1].build(signature)
        self._reduce = reduce
        self._draws = any(isinstance(layer, (nn.Dropout, DropoutNoise)) for layer in self.module.modules())

    @contextmanager
    def _forward(self, turn: Turn, phase: int) -> Iterator[None]:
        """In the recipe's precision; dropout draws from this half's own stream, a function of the step."""
        with autocast(self.train.precision, self.device):
            if not self._draws:
                yield
                return
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed_of(self.train.seed, self.stream, turn.step, turn.first, phase))
                yield

    def _step(self, factor: float) -> None:
        """Sum the gradients over the replicas and step with `factor` times the recipe's learning rate."""
        self._reduce([p.grad for p in self.parameters if p.grad is not None])
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.train.clip_norm)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()

    def average_buffers(self, replicas: int) -> None:
        """Give all replicas the mean of their running statistics (batch normalisation's)."""
        buffers = [buffer for module in self._modules() for buffer in module.buffers() if buffer.is_floating_point()]
        if replicas > 1 and buffers:
            self._reduce(buffers)
            for buffer in buffers:
                buffer.div_(replicas)

    def _modules(self) -> list[nn.Module]:
        """All that have running statistics."""
        return [self.module]

    def state(self) -> dict[str, Any]:
        """Everything that decides how this half goes on."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Made:
    """What the generator made in one turn, with its graph: what it needs to learn from it."""

    turn: Turn
    fake: Tensor
    leaves: list[Tensor]  # the weights it was made with, in the order of the module's parameters


class GeneratorHalf(_Half):
    """Makes rows, and learns from the gradient that comes back for them.

    Where it `runs_ahead`, it makes the next rows before it has learned from the last ones. Learning changes the weights
    in place, so the rows are then made with a copy of them: the gradient is that of the weights which made the rows.
    """

    stream = GENERATOR

    def __init__(self, recipe: Recipe, signature: Signature, *, device: torch.device, reduce: Reduce) -> None:
        model, _, adversarial = described(recipe)
        torch.manual_seed(seed_of(recipe.train.seed, GENERATOR))
        module = model.build_generator(signature)
        super().__init__(recipe, signature, module, recipe.optimizer, device=device, reduce=reduce)
        self.noise_size = model.noise_size
        self.runs_ahead = adversarial.mode == "pipelined"
        self._open: list[Made] = []
        self.average: MovingAverage | None = None
        if recipe.train.ema_decay:
            self.average = MovingAverage(self.module, recipe.train.ema_decay)

    def make(self, turn: Turn) -> Tensor:
        """(rows, *input_shape), float32, without the graph, which is kept where it learns from them."""
        source = noise(self.train.seed, turn, self.noise_size).to(self.device)
        leaves = self.parameters
        with torch.set_grad_enabled(turn.generator_learns):
            if not (self.runs_ahead and turn.generator_learns):
                with self._forward(turn, 0):
                    fake = self.module(source, turn.condition)
            else:
                leaves = [p.detach().clone().requires_grad_(p.requires_grad) for p in self.parameters]
                names = [name for name, _ in self.module.named_parameters()]
                weights = dict(zip(names, leaves, strict=True))
                with self._forward(turn, 0):
                    fake = torch.func.functional_call(self.module, weights, (source, turn.condition))
            fake = fake.float()
        if turn.generator_learns:
            self._open.append(Made(turn, fake, leaves))
        return fake.detach()

    def learn(self, gradient: Tensor) -> tuple[Turn, Tensor | None]:
        """Step along dL_G/dfake (rows, *input_shape) for the oldest rows that it has not learned from.

        Returns their turn, and the summed L1 distance where it is part of the loss.
        """
        made = self._open.pop(0)
        turn, fake = made.turn, made.fake
        distance: Tensor | None = None
        outputs, gradients = [fake], [gradient]
        if self.objective.l1_weight:
            apart = self.objective.reconstruction(fake, turn.real)
            outputs.append(apart)
            gradients.append(torch.full_like(apart, self.objective.l1_weight * turn.share))
            distance = apart.detach() * turn.counts
        found = torch.autograd.grad(outputs, made.leaves, gradients, allow_unused=True)
        for parameter, own in zip(self.parameters, found, strict=True):
            parameter.grad = own
        self._step(turn.factor)
        if self.average:
            self.average.update()
        return turn, distance

    def weights(self, which: Weights) -> nn.Module:
        """The generator with its plain weights, or with their moving average where one is kept."""
        return self.average.module if which == "averaged" and self.average else self.module

    def _modules(self) -> list[nn.Module]:
        """See _Half."""
        return [self.module, *([self.average.module] if self.average else [])]

    def state(self) -> dict[str, Any]:
        """See _Half."""
        return {**super().state(), "average": self.average.state_dict() if self.average else None}

    def load(self, state: dict[str, Any]) -> None:
        """See _Half."""
        super().load(state)
        self._open.clear()
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])


class DiscriminatorHalf(_Half):
    """Tells real rows from made ones, and says in which direction made ones would look more real."""

    stream = DISCRIMINATOR

    def __init__(self, recipe: Recipe, signature: Signature, *, device: torch.device, reduce: Reduce) -> None:
        model, _, adversarial = described(recipe)
        torch.manual_seed(seed_of(recipe.train.seed, DISCRIMINATOR))
        optimizer = adversarial.discriminator_optimizer or recipe.optimizer
        module = model.build_discriminator(signature)
        super().__init__(recipe, signature, module, optimizer, device=device, reduce=reduce)

    def see_real(self, turn: Turn) -> Tensor:
        """Start a step with the gradient of the real rows. Returns the sums (loss, rows taken for real)."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._forward(turn, 0):
            logits = self.module(turn.real, turn.condition)
        loss = self.objective.discriminator_real(logits)
        loss.backward(torch.full_like(loss, turn.share))
        return torch.stack((loss.detach(), _rows_where(logits > 0))) * turn.counts

    def see_fake(self, turn: Turn, fake: Tensor) -> Tensor:
        """Add the gradient of the made rows, and step. Returns the sums (loss, rows taken for made)."""
        with self._forward(turn, 1):
            logits = self.module(fake, turn.condition)
        loss = whole = self.objective.discriminator_fake(logits)
        if self.objective.gradient_penalty:
            stream = torch.Generator().manual_seed(seed_of(self.train.seed, PENALTY, turn.step))
            torch.rand(turn.first, generator=stream)  # those of the rows before this slice
            with self._forward(turn, 2):
                between = self.objective.penalty(self.module, turn.real, fake, turn.condition, stream)
            whole = loss + self.objective.gradient_penalty * between
        whole.backward(torch.full_like(whole, turn.share))
        self._step(turn.factor)
        return torch.stack((loss.detach(), _rows_where(logits <= 0))) * turn.counts

    def judge(self, turn: Turn, fake: Tensor) -> tuple[Tensor, Tensor]:
        """(dL_G/dfake, the generator's summed loss), from the discriminator as it now is; its own gradients stay."""
        fake = fake.detach().requires_grad_()
        with self._forward(turn, 3):
            logits = self.module(fake, turn.condition)
        loss = self.objective.generator(logits)
        (gradient,) = torch.autograd.grad(loss, fake, torch.full_like(loss, turn.share))
        return gradient, loss.detach() * turn.counts


def _rows_where(chosen: Tensor) -> Tensor:
    """Rows for which it is so; a row that is judged patch by patch counts with the share of its patches."""
    return chosen.flatten(1).float().mean(1).sum() if chosen.dim() > 1 else chosen.float().sum()


@torch.no_grad()
def sample(
    generator: nn.Module, source: Tensor, condition: Tensor | None, *, device: torch.device, seed: int = 0
) -> Tensor:
    """What a generator makes of noise (rows, noise_size) and conditions, in evaluation mode; on the CPU.

    `seed` is for the generator that draws noise of its own (pix2pix's dropout).
    """
    training = generator.training
    generator.eval()
    parts = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, len(source), SAMPLE_ROWS):
            here = slice(first, first + SAMPLE_ROWS)
            given = None if condition is None else condition[here].to(device)
            parts.append(generator(source[here].to(device), given).float().cpu())
    generator.train(training)
    return torch.cat(parts)
