"""Trials by hand, as people write them: argv is how (function | ray_train), the number of trials, a recipe as JSON.

`function` is a Tune function that trains with plain PyTorch; `ray_train` runs a TorchTrainer inside each trial, as
Ray's documentation has it, with as many trials at once as do not deadlock. Prints the seconds from start to end.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import numpy as np
import ray
import torch
from ray import train, tune
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn import functional as F


def fit(config: dict[str, Any]) -> float:
    """The digits, by the shortest loop; the validation accuracy."""
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    digits = load_digits()
    inputs = torch.from_numpy(digits.data.astype(np.float32) / 16)
    targets = torch.from_numpy(digits.target)
    fit_rows, held = slice(0, 1258), slice(1258, 1438)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, config["hidden"]), nn.ReLU(), nn.Linear(config["hidden"], 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], fused=True)
    for _ in range(config["epochs"]):
        for chosen in torch.randperm(1258).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[fit_rows][chosen]), targets[fit_rows][chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(inputs[held]).argmax(1) == targets[held]).float().mean())


def function(config: dict[str, Any]) -> None:
    tune.report({"accuracy": fit(config)})


def in_ray_train(config: dict[str, Any]) -> None:
    def work(config: dict[str, Any]) -> None:
        train.report({"accuracy": fit(config)})

    scaling = train.ScalingConfig(num_workers=1)
    trainer = TorchTrainer(work, train_loop_config=config, scaling_config=scaling)
    trainer.fit()
    tune.report({"accuracy": 0.0})


def main() -> None:
    how, trials, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    began = time.perf_counter()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    trainable = function if how == "function" else in_ray_train
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 1}),
        param_space={**settings, "lr": tune.loguniform(1e-4, 1e-1)},
        # two drivers would hold both CPUs, and wait for their workers for ever
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=2 if how == "function" else 1),
        run_config=tune.RunConfig(verbose=0),
    )
    tuner.fit()
    ray.shutdown()
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
