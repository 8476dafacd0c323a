"""Optimizers and learning-rate schedules as Specs: each knows how to build its torch object."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nn_models.spec import Spec, invalid

Beta = Annotated[float, Field(ge=0, lt=1)]
Parameters = Iterable[torch.nn.Parameter]


class OptimizerSpec(Spec):
    """Base of the optimizers."""

    @property
    def rests(self) -> bool:
        """Whether a weight whose gradient is 0 stays as it is: then embeddings need only the rows that are used."""
        return False


class SGDSpec(OptimizerSpec):
    """Stochastic gradient descent with momentum (Polyak 1964; Nesterov as in Sutskever et al. 2013)."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = Field(0.1, description="learning rate")
    momentum: Beta = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _nesterov_looks_ahead_along_the_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise invalid("nesterov needs a momentum", "set momentum, for instance to 0.9, or nesterov to false")
        return self

    @property
    def rests(self) -> bool:
        """See OptimizerSpec."""
        return not self.momentum and not self.weight_decay

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return torch.optim.SGD(
            parameters, self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
        )


class AdamSpec(OptimizerSpec):
    """Adam (Kingma & Ba 2015), weight decay added to the gradient."""

    kind: Literal["adam"] = "adam"
    lr: PositiveFloat = Field(1e-3, description="learning rate")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return torch.optim.Adam(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=True)


class AdamWSpec(OptimizerSpec):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-3, description="learning rate")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=True)


class RMSpropSpec(OptimizerSpec):
    """RMSprop (Hinton's lecture 6e, 2012)."""

    kind: Literal["rmsprop"] = "rmsprop"
    lr: PositiveFloat = Field(1e-3, description="learning rate")
    alpha: Beta = 0.99
    eps: PositiveFloat = 1e-8
    momentum: Beta = 0.0
    weight_decay: NonNegativeFloat = 0.0

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return torch.optim.RMSprop(parameters, self.lr, self.alpha, self.eps, self.weight_decay, self.momentum)


class AdagradSpec(OptimizerSpec):
    """Adagrad (Duchi, Hazan & Singer 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    lr: PositiveFloat = Field(1e-2, description="learning rate")
    eps: PositiveFloat = 1e-10
    weight_decay: NonNegativeFloat = 0.0

    @property
    def rests(self) -> bool:
        """See OptimizerSpec."""
        return not self.weight_decay

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return torch.optim.Adagrad(parameters, self.lr, weight_decay=self.weight_decay, eps=self.eps)


AnyOptimizerSpec = Annotated[SGDSpec | AdamSpec | AdamWSpec | RMSpropSpec | AdagradSpec, Field(discriminator="kind")]


class ScheduleSpec(Spec):
    """Base of the schedules: a linear warm-up, then `decay` of the share of training that is done.

    The learning rate is a pure function of the step, so there is no state to save.
    """

    warmup_steps: NonNegativeInt = Field(0, description="steps over which the learning rate rises from 0")

    def factor(self, step: int, num_steps: int) -> float:
        """What the learning rate is multiplied with at `step` (from 0) of `num_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.decay((step - self.warmup_steps) / max(1, num_steps - self.warmup_steps))

    def decay(self, done: float) -> float:
        """The factor after the share `done` (0 to 1) of the steps that follow the warm-up."""
        raise NotImplementedError


class ConstantSpec(ScheduleSpec):
    """The same learning rate throughout."""

    kind: Literal["constant"] = "constant"

    def decay(self, done: float) -> float:
        """See ScheduleSpec."""
        return 1.0


class CosineSpec(ScheduleSpec):
    """Half a cosine from the learning rate to `final` times it (Loshchilov & Hutter 2017, eq. 5)."""

    kind: Literal["cosine"] = "cosine"
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    def decay(self, done: float) -> float:
        """See ScheduleSpec."""
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class LinearSpec(ScheduleSpec):
    """A straight line from the learning rate to `final` times it."""

    kind: Literal["linear"] = "linear"
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    def decay(self, done: float) -> float:
        """See ScheduleSpec."""
        return 1 - (1 - self.final) * min(done, 1.0)


class StepSpec(ScheduleSpec):
    """The learning rate times `gamma` after each of `num_drops` equal parts of training but the last."""

    kind: Literal["step"] = "step"
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    num_drops: PositiveInt = 2

    def decay(self, done: float) -> float:
        """See ScheduleSpec."""
        # 0.29 * 100 is 28.999999999999996
        return self.gamma ** min(int(done * (self.num_drops + 1) + 1e-9), self.num_drops)


AnyScheduleSpec = Annotated[ConstantSpec | CosineSpec | LinearSpec | StepSpec, Field(discriminator="kind")]
