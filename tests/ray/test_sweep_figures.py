"""A sweep chooses by what it shows: a trial's value, its metrics and best.yaml trained again agree."""

from pathlib import Path
from typing import Any

import pytest
import torch

import cluster
from cluster.training.run_directory import RunDirectory, read_metrics

SWEPT: dict[str, Any] = {
    "name": "swept",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "train": {"epochs": 6, "global_batch_size": 100},
    "sweep": {
        "space": {"optimizer.lr": {"grid": [0.5, 1.0, 2.0]}},
        "searcher": "grid",
        "scheduler": "none",
        "metric": "validation/loss",  # and the weights are kept by their accuracy
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    """As trials have: other threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fuse", ["off", 3])
def test_values_are_of_the_weights_that_are_kept(ray, tmp_path, fuse):
    outcome = cluster.sweep(SWEPT, run=str(tmp_path / "sweep"), fuse=fuse)
    for trial in outcome.trials:
        run = RunDirectory(f"{outcome.run}/trials/{trial.name}")
        result = run.result()
        assert result is not None
        assert trial.metrics == result["metrics"]
        looks = [line for line in read_metrics(run) if line["split"] == "validation"]
        kept = min(looks, key=lambda line: (-line["accuracy"], line["loss"]))
        assert trial.value == kept["loss"] == result["metrics"]["validation/loss"]
        assert result["best"]["epoch"] == kept["epoch"] + 1
    best = outcome.best_trial
    assert best is not None
    assert best.value == min(trial.value or 0 for trial in outcome.trials)
    assert outcome.result["metrics"]["validation/loss"] == best.value
    shown = cluster.evaluate(outcome.run, split="validation")["metrics"]
    # a fused trial's sums are added in another order
    assert shown["validation/loss"] == pytest.approx(best.value, rel=1e-4)
    again = cluster.train(str(Path(outcome.run, "best.yaml")), run=str(tmp_path / "again"))
    assert again.metrics["validation/loss"] == pytest.approx(best.value, rel=0 if fuse == "off" else 1e-3)
