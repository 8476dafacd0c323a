"""Faults by real signals: killed workers, a killed driver, damaged shards, a diverging loss."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import cluster
from cluster.errors import Diverged, RunFailed
from nn_models.errors import Problem, UserError
from tests.ray.conftest import EXACT
from tests.ray.faults import MARK, digests, killing, left_over, steps_done, wait_for, weights

# Dropout, momentum and the moving average carry state; checkpoints fall in mid-epoch. Long enough to be hit.
LONG = {
    "model.hidden": [256, 256],
    "model.dropout": 0.2,
    "train.ema_decay": 0.9,
    "train.epochs": 12,
    "train.checkpoint_every_steps": 5,
    "data.augment": [{"kind": "random_crop", "padding": 1}],
}


@pytest.fixture(scope="module")
def undisturbed(ray, tmp_path_factory):
    return cluster.train(EXACT, num_workers=2, run=str(tmp_path_factory.mktemp("whole") / "run"), overrides=LONG)


@pytest.mark.parametrize("step", [1, 17, 60])
def test_a_killed_worker_changes_nothing(ray, undisturbed, tmp_path, step):
    run = tmp_path / "run"
    with killing("RayTrainWorker", when=lambda: steps_done(run) >= step, number=step % 2):
        outcome = cluster.train(EXACT, num_workers=2, run=str(run), overrides=LONG)
    assert outcome.status == "finished"
    assert outcome.result["restarts"] == 1
    ours, theirs = weights(run), weights(undisturbed.run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert outcome.metrics == undisturbed.metrics
    assert digests(run) == digests(undisturbed.run)


def test_workers_that_always_die_end_the_run(ray, tmp_path):
    recipe = {**EXACT, "model": {"kind": "custom", "target": "tests.ray.nets:Suicidal"}}
    with pytest.raises(RunFailed, match=r"failed more often than train\.max_failures"):
        cluster.train(recipe, num_workers=1, run=str(tmp_path / "run"), overrides={"train.max_failures": 1})
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_an_error_in_the_model_is_not_tried_again(ray, tmp_path):
    recipe = {**EXACT, "model": {"kind": "custom", "target": "tests.ray.nets:Faulty"}}
    with pytest.raises(RunFailed, match="ValueError: this net fails in its third step"):
        cluster.train(recipe, num_workers=2, run=str(tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "third step" in result["error"]


def test_a_diverging_loss_names_its_step(ray, tmp_path):
    wild = {"optimizer.lr": 1e30, "model.activation": "relu"}
    with pytest.raises(Diverged, match=r"NaN or infinite at step \d+ .*lower optimizer.lr"):
        cluster.train(EXACT, num_workers=2, run=str(tmp_path / "run"), overrides=wild)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_a_damaged_shard_found_while_streaming_is_named(ray, tmp_path):
    from cluster.data.prepare import prepare
    from cluster.data.sources.images import DigitsSpec
    from cluster.storage import Folder

    prepare(DigitsSpec(), Folder(tmp_path / "data"))
    shard = tmp_path / "data" / "train-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    streamed = {**EXACT, "data": {"kind": "shards", "path": str(tmp_path / "data"), "shuffle_window": 100}}
    with pytest.raises(UserError, match=r"train-00000.parquet: the shard") as caught:
        cluster.train(streamed, num_workers=2, run=str(tmp_path / "run"))
    assert caught.value.path == str(shard)  # its fields come out of the worker
    assert str(caught.value.fix).startswith("delete")


def test_a_user_error_keeps_its_fields_through_ray(ray):
    problems = (Problem("a.png", "no image", "remove it", names=("data.path",)), Problem("lr", "unknown", None))

    def fail():
        raise UserError.of(problems)

    with pytest.raises(UserError) as caught:
        ray.get(ray.remote(num_cpus=0)(fail).remote())
    assert caught.value.problems == problems
    assert (caught.value.path, caught.value.message, caught.value.fix) == ("a.png", "no image", "remove it")


def test_a_killed_driver_leaves_nothing_behind_and_can_be_continued(undisturbed, tmp_path):
    """From the command line, with an embedded Ray of its own."""
    run = tmp_path / "run"
    recipe = tmp_path / "exact.yaml"
    settings = [f"--set={path}={json.dumps(value)}" for path, value in LONG.items()]
    recipe.write_text(json.dumps(EXACT))
    command = [sys.executable, "-m", "jobs", "train", str(recipe), *settings, "--workers=2", f"--run={run}"]
    mark = {MARK: str(tmp_path)}
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **mark})
    wait_for(lambda: steps_done(run) >= 30)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not left_over(mark), seconds=60)
    assert not (run / "result.json").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=300, env={**os.environ, **mark})
    ours, theirs = weights(run), weights(undisturbed.run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    wait_for(lambda: not left_over(mark), seconds=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_run_and_says_so(tmp_path, number):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "jobs", "train", "digits-mlp", "--workers=2", f"--run={run}"]
    driver = subprocess.Popen(
        [*command, "--set=train.epochs=5000"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: steps_done(run) >= 100)
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert errors.splitlines()[-1].startswith("error: interrupted")
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
