"""The same recipe on any number of workers: the same rows, the same steps, the same losses."""

import json
from pathlib import Path

import pytest
import torch

import cluster
from nn_models import UserError
from tests.ray.conftest import EXACT
from tests.ray.faults import all_is_free, wait_for


def lines(run: str, split: str = "train", ends: bool = False) -> list[dict]:
    entries = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [e for e in entries if e["split"] == split and bool(e.get("end_of_epoch")) == ends]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cluster.train(EXACT, run=str(tmp_path_factory.mktemp("alone") / "run"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_trains_alike(ray, alone, tmp_path, num_workers):
    outcome = cluster.train(EXACT, num_workers=num_workers, run=str(tmp_path / "run"))
    assert outcome.result["world_size"] == num_workers
    ours, theirs = lines(outcome.run), lines(alone.run)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # float32 sums in another order, over 39 steps
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    digests = [[line["rows_digest"] for line in lines(run, ends=True)] for run in (outcome.run, alone.run)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == EXACT["train"]["epochs"]
    assert outcome.metrics == pytest.approx(alone.metrics, abs=1e-4)
    assert cluster.evaluate(outcome.run)["metrics"] == pytest.approx(
        {name: value for name, value in outcome.metrics.items() if name.startswith("test/")}, abs=1e-6
    )


def test_streamed_rows_are_the_same_on_any_number_of_workers(ray, tmp_path):
    streamed = {"data.shuffle_window": 200, "train.epochs": 2, "train.global_batch_size": 90}
    runs = [
        cluster.train(EXACT, num_workers=workers, run=str(tmp_path / f"run{workers}"), overrides=streamed)
        for workers in (0, 2)
    ]
    digests = [[line["rows_digest"] for line in lines(outcome.run, ends=True)] for outcome in runs]
    assert digests[0] == digests[1]
    losses = [[line["loss"] for line in lines(outcome.run)] for outcome in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_batch_norm_dropout_average_and_accumulation_on_two_workers(ray, tmp_path):
    outcome = cluster.train(
        "digits-cnn",
        num_workers=2,
        run=str(tmp_path / "run"),
        overrides={"train.epochs": 8, "train.accumulation": 2, "train.clip_norm": 1.0},
    )
    assert outcome.metrics["test/accuracy"] > 0.93
    assert outcome.load_model()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 10)
    evaluated = cluster.evaluate(outcome.run)["metrics"]
    assert evaluated["test/accuracy"] == pytest.approx(outcome.metrics["test/accuracy"], abs=1e-9)


def test_elastic_runs_take_what_there_is(ray, tmp_path):
    outcome = cluster.train(EXACT, num_workers=(1, 2), run=str(tmp_path / "run"), overrides={"train.epochs": 1})
    assert outcome.status == "finished"
    assert outcome.result["world_size"] in (1, 2)


def test_more_workers_than_can_ever_be_placed_are_refused(ray, tmp_path):
    with pytest.raises(UserError, match=r"--workers: 64 workers of 1 CPU each can never be placed: the cluster has 8"):
        cluster.train(EXACT, num_workers=64, run=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"1 GPU each can never be placed"):
        cluster.train(EXACT, num_workers=1, use_gpu=True, run=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_nothing_is_left_in_the_cluster(ray):
    """After all the runs above every CPU is free and no placement group is alive."""
    wait_for(lambda: all_is_free(ray))
