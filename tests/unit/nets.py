"""Custom models for tests of the loop: one that is well, and some that go wrong on purpose."""

import os
from pathlib import Path

import torch
from torch import Tensor, distributed, nn


class Linear(nn.Module):
    """The simplest net that can be trained."""

    def __init__(self, signature, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(signature.input_size, signature.num_outputs)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) * self.scale


class _Counting(Linear):
    """Knows its training steps, from 1."""

    def __init__(self, signature, step: int) -> None:
        super().__init__(signature)
        self.bad_step, self.steps = step, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            self.steps += self.training
        return self.count(super().forward(x))

    def count(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError


class NaNLoss(_Counting):
    """Puts out NaN in one training step."""

    def count(self, outputs: Tensor) -> Tensor:
        return outputs * float("nan") if self.training and self.steps == self.bad_step else outputs


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class InfiniteGradient(_Counting):
    """Breaks its weights in one training step, whose loss is well."""

    def count(self, outputs: Tensor) -> Tensor:
        return _InfiniteGradient.apply(outputs) if self.training and self.steps == self.bad_step else outputs


class NaNEvaluation(_Counting):
    """Puts out NaN wherever it is evaluated after one training step."""

    def count(self, outputs: Tensor) -> Tensor:
        return outputs * float("nan") if not self.training and self.steps >= self.bad_step else outputs


class Worsening(_Counting):
    """Means the opposite after one training step."""

    def count(self, outputs: Tensor) -> Tensor:
        return -outputs if not self.training and self.steps > self.bad_step else outputs


class Killed(_Counting):
    """Kills its process in one training step."""

    def count(self, outputs: Tensor) -> Tensor:
        if self.training and self.steps == self.bad_step:
            os.kill(os.getpid(), 9)
        return outputs


class Normalised(nn.Module):
    """Writes down its running statistics whenever it is evaluated, a file for each rank and time."""

    def __init__(self, signature, folder: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(signature.input_size, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, signature.num_outputs)
        )
        self.folder, self.times = folder, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and x.device.type != "meta":
            norm = self.layers[1]
            rank = distributed.get_rank() if distributed.is_initialized() else 0
            torch.save([norm.running_mean, norm.running_var], Path(self.folder) / f"{self.times}-{rank}.pt")
            self.times += 1
        return self.layers(x.flatten(1))


class LooksAtValues(Linear):
    """Cannot be tried out without memory."""

    def __init__(self, signature) -> None:
        super().__init__(signature)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else x * 1)


class Strided(nn.Module):
    """Its weights are not contiguous, and two names share one of them."""

    def __init__(self, signature) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(signature.num_outputs, signature.input_size).t() * 0.1)
        self.same = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ (self.weight + self.same)


class WrongShape(Linear):
    """Has one output too many."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x[:, :1]], 1)


class Frozen(Linear):
    """Has nothing to train."""

    def __init__(self, signature) -> None:
        super().__init__(signature)
        self.requires_grad_(False)


class FailsToBuild(nn.Module):
    """Raises what nobody expects."""

    def __init__(self) -> None:
        raise KeyError("depth")


class FailsToRun(Linear):
    """Raises what nobody expects."""

    def forward(self, x: Tensor) -> Tensor:
        raise IndexError("list index out of range")


class Cell(nn.Module):
    """A cell that has weights beside a layer, takes another layer's weights without calling it, and shares some."""

    def __init__(self, signature) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(signature.input_size))
        self.uncalled = nn.Linear(signature.input_size, signature.num_outputs)
        self.first = nn.Linear(signature.num_outputs, signature.num_outputs)
        self.second = nn.Linear(signature.num_outputs, signature.num_outputs, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first((x * self.gate.sigmoid()) @ self.uncalled.weight.t()))


class Layers(nn.Module):
    """So many layers one after the other."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(number):
            self.layers.append(nn.Linear(1, 1))


class Branching(Linear):
    """Computes something else for batches whose first and last rows differ."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs if float((x[0] - x[-1]).abs().sum()) > 0 else 2 - 3 * outputs
