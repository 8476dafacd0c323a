"""Sweeps by Ray Tune: every executor, every scheduler, faults by real signals; nothing is lost or left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import cluster
from cluster.data.prepare import prepare
from cluster.storage import Folder
from cluster.training.run_directory import RunDirectory
from cluster.tuning.ledger import SweepDirectory
from cluster.tuning.outcome import SweepOutcome, replayed
from cluster.tuning.sweep import sweep as sweep_at_will
from nn_models import UserError
from tests.ray.faults import MARK, all_is_free, killing, left_over, wait_for

# Ray believes in more CPUs than there are; as many processes would only wait for each other
sweep = partial(sweep_at_will, concurrency=2)
TRIAL = "ResourceTrainable"  # as Tune wraps a trial's class

GRID: dict[str, Any] = {
    "name": "grid",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "train": {"epochs": 4, "global_batch_size": 64, "cpus_per_worker": 1},
    "sweep": {
        "space": {"optimizer.lr": {"grid": [1e-4, 1e-2, 0.3]}, "train.seed": {"grid": [0, 1]}},
        "searcher": "grid",
        "scheduler": "none",
    },
}
POPULATION = {
    **GRID,
    "train": {"epochs": 8, "global_batch_size": 64, "cpus_per_worker": 1},
    "sweep": {
        "space": {"optimizer.lr": {"loguniform": [1e-5, 0.3]}, "optimizer.momentum": {"uniform": [0, 0.9]}},
        "num_trials": 4,
        "scheduler": "pbt",
        "perturb_epochs": 2,
        "metric": "validation/loss",
    },
}
GAN = {
    "model": {"kind": "dcgan", "width": 8, "noise_size": 8},
    "data": {"kind": "digits"},
    "objective": {"kind": "adversarial"},
    "optimizer": {"kind": "adam", "lr": 2e-4, "betas": [0.5, 0.999]},
    "train": {"epochs": 2, "global_batch_size": 64, "cpus_per_worker": 1},
    "sweep": {"space": {"optimizer.lr": {"choice": [1e-5, 5e-3]}}, "num_trials": 2, "scheduler": "none"},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values(outcome: SweepOutcome) -> dict[int, float | None]:
    return {trial.index: trial.value for trial in outcome.trials}


@pytest.fixture(scope="module")
def grid(ray, tmp_path_factory):
    return sweep(GRID, run=str(tmp_path_factory.mktemp("grid") / "sweep"))


def test_a_grid(ray, grid):
    assert [trial.status for trial in grid.trials] == ["finished"] * 6
    assert [trial.overrides["optimizer.lr"] for trial in grid.trials] == [1e-4, 1e-4, 1e-2, 1e-2, 0.3, 0.3]
    assert grid.best_trial.value == max(values(grid).values())
    again = cluster.train(grid.best, run=str(Path(grid.run).parent / "again"))
    assert again.result["best"]["value"] == grid.best_trial.value
    from_file = cluster.load_recipe(str(Path(grid.run, "best.yaml")))
    assert from_file == grid.best
    alone = cluster.train(
        {k: v for k, v in GRID.items() if k != "sweep"},
        run=str(Path(grid.run).parent / "alone"),
        overrides=grid.trials[3].overrides,
    )
    assert alone.result["best"]["value"] == grid.trials[3].value
    assert alone.metrics == pytest.approx(grid.trials[3].metrics)
    table = pq.read_table(Path(grid.run) / "trials.parquet").to_pylist()
    assert [row["optimizer.lr"] for row in table] == [trial.overrides["optimizer.lr"] for trial in grid.trials]
    assert Path(grid.run, "model", "model.safetensors").exists()
    assert json.loads(Path(grid.run, "result.json").read_text())["trials"]["finished"] == 6
    wait_for(lambda: all_is_free(ray))


def test_asha_with_optuna_and_invalid_samples(ray, tmp_path):
    recipe = {
        **GRID,
        "sweep": {
            "space": {
                "optimizer.lr": {"loguniform": [1e-6, 1]},
                "model.hidden": {"choice": [[16], [8, 8]]},
                "train.epochs": {"choice": [9]},
                "optimizer.nesterov": {"choice": [True]},
                "optimizer.momentum": {"choice": [0.0, 0.9]},
            },
            "num_trials": 16,
            "searcher": "optuna",
        },
    }
    outcome = sweep(recipe, run=str(tmp_path / "sweep"))
    statuses = [trial.status for trial in outcome.trials]
    assert len(statuses) == 16
    assert set(statuses) <= {"finished", "pruned", "invalid"}
    assert "invalid" in statuses
    assert "pruned" in statuses
    assert all("nesterov" in trial.error for trial in outcome.trials if trial.status == "invalid")
    assert outcome.best_trial.status == "finished"
    wait_for(lambda: all_is_free(ray))


def test_a_population_exchanges_and_is_replayed(ray, tmp_path):
    outcome = sweep_at_will(POPULATION, run=str(tmp_path / "sweep"))
    moved = [trial for trial in outcome.trials if len(trial.lineage) > 1]
    assert moved, "no exploit happened"
    for trial in moved[:2]:
        recipe = replayed(outcome.run, trial.index)
        again = cluster.train(recipe, run=str(tmp_path / f"replay{trial.index}"))
        assert again.metrics == pytest.approx(trial.metrics, rel=1e-6)
        own = RunDirectory(str(tmp_path / "sweep" / "trials" / trial.name))
        for name in ("recipe.yaml", "model/recipe.yaml"):  # what trains and evaluates this run again
            assert own.recipe(name).model_copy(update={"name": recipe.name}) == recipe
    with pytest.raises(UserError, match="--concurrency: the trials of a population run at once as far as"):
        sweep(POPULATION, run=str(tmp_path / "few"))


def test_an_interrupted_sweep_says_how_to_go_on_and_does(tmp_path):
    """From the command line, with an embedded Ray of its own and a real SIGINT."""
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(json.dumps({**GRID, "train": {**GRID["train"], "log_every_steps": 1, "global_batch_size": 8}}))
    run = tmp_path / "sweep"
    command = [sys.executable, "-m", "jobs", "sweep", str(recipe), f"--run={run}", "--fuse=off", "--concurrency=1"]
    mark = {MARK: str(tmp_path)}
    told: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, **mark, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, **told, env=environment, start_new_session=True)
    wait_for(lambda: any((run / "trials").glob("*/result.json")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted; to go on: manta sweep " in errors.strip().splitlines()[-1]
    wait_for(lambda: not left_over(mark), seconds=60)
    kept = {path: path.stat().st_mtime_ns for path in (run / "trials").glob("*/result.json")}
    assert 1 <= len(kept) < 6
    done = subprocess.run([*command, "--resume", "--json"], **told, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"]["finished"] == 6
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    wait_for(lambda: not left_over(mark), seconds=60)


def test_ray_train_inside_trials_gives_everything_back(ray, tmp_path):
    recipe = {
        **GRID,
        "train": {**GRID["train"], "epochs": 3},
        "sweep": {"space": {"optimizer.lr": {"choice": [0.1, 1e-5]}}, "num_trials": 3, "seed": 1},
    }
    outcome = sweep(recipe, num_workers=2, run=str(tmp_path / "sweep"))
    assert {trial.status for trial in outcome.trials} <= {"finished", "pruned"}
    wait_for(lambda: all_is_free(ray))


def test_a_killed_trial_with_ray_train_inside_leaves_nothing(ray, tmp_path):
    recipe = {
        **GRID,
        "train": {**GRID["train"], "epochs": 4, "log_every_steps": 1, "global_batch_size": 8},
        "sweep": {"space": {"train.seed": {"grid": [0]}}, "searcher": "grid", "scheduler": "none"},
    }
    run = tmp_path / "sweep"
    with killing(TRIAL, when=lambda: any((run / "trials" / "0000" / "checkpoints").glob("step-*.pt"))):
        outcome = sweep(recipe, num_workers=2, run=str(run))
    assert [(trial.status, trial.attempts) for trial in outcome.trials] == [("finished", 2)]
    wait_for(lambda: all_is_free(ray))


def test_a_gan_in_the_trials_placement_group(ray, tmp_path):
    outcome = sweep(GAN, run=str(tmp_path / "actors"))
    local = sweep(GAN, run=str(tmp_path / "local"), num_workers=0)
    assert values(outcome) == values(local)
    assert outcome.result["metric"] == "validation/frechet_distance"
    wait_for(lambda: all_is_free(ray))


def driver(recipe: dict[str, Any], run: Path) -> subprocess.Popen:
    script = (
        "import sys, json; from cluster.tuning.sweep import sweep;"
        "sweep(json.loads(sys.argv[1]), run=sys.argv[2], fuse='off')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(recipe), str(run)],
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_sweep_is_resumed_to_the_same_end(ray, grid, tmp_path):
    slow = {**GRID, "train": {**GRID["train"], "log_every_steps": 1, "global_batch_size": 8}}
    undisturbed = sweep(slow, run=str(tmp_path / "whole"))
    run = tmp_path / "sweep"
    process = driver(slow, run)

    def ended() -> list[int]:
        if not (run / "trials").exists():
            return []
        return [r.index for r in SweepDirectory(str(run)).records() if r.status == "finished"]

    wait_for(lambda: len(ended()) >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {index: (run / "trials" / f"{index:04d}" / "result.json").stat().st_mtime_ns for index in ended()}
    assert 2 <= len(kept) < 6
    outcome = sweep(slow, run=str(run), resume=True)
    for index, when in kept.items():
        assert (run / "trials" / f"{index:04d}" / "result.json").stat().st_mtime_ns == when
    assert values(outcome) == values(undisturbed)
    assert outcome.best == undisturbed.best
    shutil.rmtree(run / "trials" / "0002")
    assert values(sweep(slow, run=str(run), resume=True)) == values(undisturbed)
    when = (run / "result.json").stat().st_mtime_ns
    sweep(slow, run=str(run), resume=True)  # nothing is left to do
    assert (run / "result.json").stat().st_mtime_ns == when
    wait_for(lambda: all_is_free(ray))


def test_a_sweep_whose_data_has_moved_goes_on(ray, tmp_path):
    prepare(cluster.load_recipe(GRID).data, Folder(tmp_path / "here"))
    shards = {"kind": "shards", "path": str(tmp_path / "here")}
    space = {"optimizer.lr": {"grid": [1e-2, 0.3]}}
    recipe = {**GRID, "data": shards, "sweep": {**GRID["sweep"], "space": space}}
    run = SweepDirectory(str(tmp_path / "sweep"))
    whole = sweep(recipe, run=str(run), fuse="off")
    # as a driver leaves it that dies while the last trial trains
    run.folder.delete("result.json")
    for name in ("result.json", "checkpoints", "model/model.safetensors"):
        run.trial(1).delete(name)
    run.write(replace(run.records()[1], status="running"))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = {"data.path": str(tmp_path / "there"), "sweep.max_failures": 0, "train.keep_checkpoints": 1}
    outcome = sweep(recipe, run=str(run), resume=True, overrides=moved, fuse="off")
    assert values(outcome) == values(whole)
    for place in (run.folder, run.folder / "model", run.trial(1), run.trial(1) / "model"):
        found = cluster.load_recipe(f"{place}/recipe.yaml")
        assert (found.data.path, found.train.keep_checkpoints) == (str(tmp_path / "there"), 1)


def test_a_space_of_the_data(ray, tmp_path):
    space = {"data.validation_fraction": {"grid": [0.1, 0.2]}, "data.shuffle_window": {"grid": [None, 100]}}
    recipe = {**GRID, "sweep": {**GRID["sweep"], "space": space}}
    outcome = sweep(recipe, run=str(tmp_path / "sweep"), fuse="off")
    assert [trial.status for trial in outcome.trials] == ["finished"] * 4
    alone = cluster.train(replayed(outcome.run, 3), run=str(tmp_path / "alone"))
    assert alone.metrics == pytest.approx(outcome.trials[3].metrics)


def test_failing_trials_do_not_end_a_sweep(ray, tmp_path):
    recipe = {
        **GRID,
        "sweep": {"space": {"optimizer.lr": {"grid": [0.1, 1e30]}}, "searcher": "grid", "scheduler": "none"},
    }
    outcome = sweep(recipe, run=str(tmp_path / "sweep"))
    assert [trial.status for trial in outcome.trials] == ["finished", "failed"]
    assert "NaN or infinite" in outcome.trials[1].error
    retried = sweep(recipe, run=str(tmp_path / "sweep"), resume=True, retry_failed=True)
    assert [trial.attempts for trial in retried.trials] == [1, 2]


def test_a_killed_trial_goes_on(ray, tmp_path):
    recipe = {
        **GRID,
        "train": {**GRID["train"], "log_every_steps": 1, "global_batch_size": 2},
        "sweep": {"space": {"train.seed": {"grid": [0]}}, "searcher": "grid", "scheduler": "none"},
    }
    alone = cluster.train({k: v for k, v in recipe.items() if k != "sweep"}, run=str(tmp_path / "alone"))
    run = tmp_path / "sweep"
    with killing(TRIAL, when=lambda: any((run / "trials" / "0000" / "checkpoints").glob("step-*.pt"))):
        outcome = sweep(recipe, run=str(run), fuse="off")
    assert outcome.trials[0].attempts == 2
    assert outcome.trials[0].value == alone.result["best"]["value"]


def test_fused_trials_are_what_they_are_alone(ray, grid, tmp_path):
    outcome = sweep(GRID, run=str(tmp_path / "sweep"), fuse=6)
    assert outcome.result["fused"] == 6
    assert grid.result["fused"] == 1  # groups of three, by itself, would be too small
    for fused, alone in zip(outcome.trials, grid.trials, strict=True):
        assert fused.metrics == pytest.approx(alone.metrics, abs=1e-4)
    with pytest.raises(UserError, match="--fuse: 'many'"):
        sweep(GRID, run=str(tmp_path / "many"), fuse="many")
    with pytest.raises(UserError, match="--fuse: 4: these trials cannot train together"):
        sweep(GAN, run=str(tmp_path / "gan"), fuse=4)


def test_what_cannot_be_is_refused(ray, tmp_path):
    def refused(message: str, num_workers: int = 1, use_gpu: bool = False, **section: Any) -> None:
        with pytest.raises(UserError, match=message):
            sweep(
                {**GRID, "sweep": {**GRID["sweep"], **section}},
                run=str(tmp_path / "sweep"),
                num_workers=num_workers,
                use_gpu=use_gpu,
            )
        assert not (tmp_path / "sweep").exists()

    refused("optimizer.lrr", space={"optimizer.lrr": {"grid": [1]}})
    refused("choice", space={"optimizer.lr": {"choice": []}})
    refused("uniform", space={"optimizer.lr": {"uniform": []}}, searcher="random")
    refused("It reports|known", metric="validation/f1")
    refused("not even one fits", num_workers=20)
    refused("1 GPU", use_gpu=True)
    with pytest.raises(UserError, match="no section sweep"):
        sweep("digits-cnn", run=str(tmp_path / "sweep"))
    with pytest.raises(UserError, match="holds no sweep"):
        sweep(GRID, run=str(tmp_path / "none"), resume=True)


def test_sixty_trials_leave_everything_free(ray, tmp_path):
    recipe = {
        **GRID,
        "train": {**GRID["train"], "epochs": 9},
        "sweep": {"space": {"optimizer.lr": {"loguniform": [1e-6, 1]}}, "num_trials": 60},
    }
    outcome = sweep(recipe, run=str(tmp_path / "sweep"))
    assert len(outcome.trials) == 60
    assert {trial.status for trial in outcome.trials} == {"finished", "pruned"}
    wait_for(lambda: all_is_free(ray))


def test_a_killed_group_of_fused_trials_loses_none(ray, tmp_path):
    train = {**GRID["train"], "epochs": 12, "log_every_steps": 1, "global_batch_size": 2}
    space = {"optimizer.lr": {"grid": [1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1]}}
    recipe = {**GRID, "train": train, "sweep": {"space": space, "searcher": "grid", "scheduler": "asha"}}
    undisturbed = sweep(recipe, run=str(tmp_path / "whole"), fuse=6)
    run = tmp_path / "sweep"
    with killing(TRIAL, when=lambda: any((run / "trials").glob("*/result.json"))):  # some have left the group
        outcome = sweep(recipe, run=str(run), fuse=6)
    assert {trial.status for trial in outcome.trials} == {"finished", "pruned"}
    assert values(outcome) == pytest.approx(values(undisturbed))
    assert outcome.best_trial.index == undisturbed.best_trial.index
    wait_for(lambda: all_is_free(ray))
