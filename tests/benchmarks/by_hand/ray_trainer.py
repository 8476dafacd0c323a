"""A bare TorchTrainer: one epoch of the digits on two workers with plain DDP, reported once; argv is its storage."""

import sys

import numpy as np
import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

NUM_ROWS = 1258  # as many as manta trains on


def work() -> None:
    digits = load_digits()
    inputs = torch.from_numpy(digits.data.astype(np.float32) / 16)[:NUM_ROWS]
    targets = torch.from_numpy(digits.target)[:NUM_ROWS]
    context = ray.train.get_context()
    torch.manual_seed(0)
    model = prepare_model(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    for batch in order.split(64):
        chosen = batch[context.get_world_rank() :: context.get_world_size()]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[chosen]), targets[chosen])
        loss.backward()
        optimizer.step()
    ray.train.report({"loss": loss.item()})


if __name__ == "__main__":
    ray.init(address="local")  # not whichever Ray runs here, or ran here and left its address
    scaling, run = ScalingConfig(num_workers=2), RunConfig(storage_path=sys.argv[1])
    print(TorchTrainer(work, scaling_config=scaling, run_config=run).fit().metrics)
