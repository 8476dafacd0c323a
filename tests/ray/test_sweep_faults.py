"""A sweep whose storage or Ray has gone: one line that says how to go on, and it goes on."""

import json

import pytest

import cluster
from cluster.errors import RayLost, StorageFailed
from cluster.runtime.lifeline import Lifeline
from cluster.tuning.ledger import SweepDirectory

RECIPE = {
    "name": "small",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "train": {"epochs": 4, "global_batch_size": 256, "cpus_per_worker": 1},
    "sweep": {
        "space": {"optimizer.lr": {"loguniform": [1e-3, 1e-1]}},
        "num_trials": 4,
        "metric": "validation/loss",
        "mode": "min",
        "scheduler": "none",
    },
}


def finished(run) -> bool:
    outcome = cluster.sweep(RECIPE, run=str(run), resume=True, fuse="off")
    return outcome.status == "finished" and {trial.status for trial in outcome.trials} == {"finished"}


def test_records_that_cannot_be_written_end_the_sweep(ray, tmp_path, monkeypatch):
    run, write, written = tmp_path / "sweep", SweepDirectory.write, []

    def failing(directory, record):
        written.append(record.index)
        if len(written) > 4:
            raise StorageFailed(f"{directory}/trials: cannot be written (No space left on device); make room there")
        write(directory, record)

    monkeypatch.setattr(SweepDirectory, "write", failing)
    with pytest.raises(StorageFailed) as error:
        cluster.sweep(RECIPE, run=str(run), fuse="off", concurrency=2)
    assert "\n" not in str(error.value)
    assert "No space left" in str(error.value)
    assert f"to go on: manta sweep {run}/recipe.yaml --run {run} --resume --concurrency 2 --fuse off" in str(
        error.value
    )
    monkeypatch.undo()
    assert finished(run)


def test_a_ray_that_has_gone_ends_the_sweep(ray, tmp_path, monkeypatch):
    run = tmp_path / "sweep"

    def broken(lifeline):
        return "Ray's GCS has died" if list(run.glob("trials/*/metrics.jsonl")) else None

    monkeypatch.setattr(Lifeline, "broken", broken)
    with pytest.raises(RayLost, match="Ray's GCS has died; to go on: manta sweep"):
        cluster.sweep(RECIPE, run=str(run), fuse="off")
    assert json.loads((run / "result.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert finished(run)
