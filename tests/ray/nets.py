"""Custom models that go wrong in a worker, or are slow."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


class Faulty(nn.Module):
    """Raises in its third training step."""

    def __init__(self, signature):
        super().__init__()
        self.linear = nn.Linear(signature.input_size, signature.num_outputs)
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.device.type != "meta":
            self.steps += 1
            if self.steps == 3:
                raise ValueError("this net fails in its third step")
        return self.linear(x.flatten(1))


class Suicidal(Faulty):
    """Kills its own process in its second training step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.device.type != "meta":
            self.steps += 1
            if self.steps == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.linear(x.flatten(1))


class Paced(nn.Module):
    """With dropout and batch normalisation; its steps take a while for as long as there is no such file."""

    def __init__(self, signature, until: str):
        super().__init__()
        hidden = [nn.Linear(signature.input_size, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2)]
        self.layers = nn.Sequential(*hidden, nn.Linear(32, signature.num_outputs))
        self.until = Path(until)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.device.type != "meta" and not self.until.exists():
            time.sleep(0.1)
        return self.layers(x.flatten(1))


class Watched(nn.Module):
    """Is slow while the folder has a file named slow; kills its own process, once, where it has one named kill."""

    def __init__(self, signature, folder: str):
        super().__init__()
        self.linear = nn.Linear(signature.input_size, signature.num_outputs)
        self.folder = folder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if Path(self.folder, "slow").exists():
            time.sleep(0.3)
        if Path(self.folder, "kill").exists():
            Path(self.folder, "kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.linear(x.flatten(1))
