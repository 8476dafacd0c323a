"""The coordinator with both halves in this process: looks, the best, restarts, resuming, collapse."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cluster
from cluster.adversarial.coordinator import Coordinator
from cluster.adversarial.features import open_features
from cluster.adversarial.players import LocalPlayers, PlayersLost
from cluster.adversarial.quality import Quality
from cluster.data.manifest import Manifest
from cluster.data.prepare import prepared
from cluster.errors import RunFailed
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints, read_model
from cluster.training.run_directory import RunDirectory
from cluster.training.splits import open_splits
from nn_models import UserError

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"kind": "dcgan", "width": 8, "noise_size": 16},
    "data": {"kind": "digits"},
    "objective": {"kind": "adversarial"},
    "optimizer": {"kind": "adam", "lr": 2e-4, "betas": [0.5, 0.999]},
    "train": {"global_batch_size": 64, "epochs": 3, "log_every_steps": 7, "ema_decay": 0.9},
}


# few steps, and each look measures one generator
LARGE: dict[str, Any] = {"global_batch_size": 600, "ema_decay": None}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines(run: str | Path, split: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["split"] == split]


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    return cluster.train(TINY, run=str(tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_leaves_what_it_should(whole):
    assert whole.status == "finished"
    steps = whole.result["steps"] // 3
    assert [line["step"] for line in lines(whole.run, "validation")] == [0, steps, 2 * steps, 3 * steps]
    train = lines(whole.run, "train")
    assert [line["step"] for line in train if "rows_digest" in line] == [steps, 2 * steps, 3 * steps]
    assert {"generator_loss", "discriminator_loss", "real_accuracy", "fake_accuracy"} <= train[0].keys()
    assert train[0]["step"] == 7
    assert {"test/frechet_distance", "test/frechet_floor", "test/kernel_distance", "test/diversity"} <= set(
        whole.metrics
    )
    best = min(lines(whole.run, "validation"), key=lambda line: line["frechet_distance"])
    assert whole.result["best"]["step"] == best["step"]
    assert whole.result["best"]["weights"] == best["weights"]
    assert whole.result["untrained"]["frechet_distance"] == lines(whole.run, "validation")[0]["frechet_distance"]
    pictures = sorted(Path(whole.run, "samples").iterdir())
    assert len(pictures) == 4
    assert Image.open(pictures[0]).size == (10 * 34 + 2, 6 * 34 + 2)
    model = whole.load_model()
    assert model.net(torch.randn(5, 16)).shape == (5, 1, 8, 8)
    assert model(5).shape == (5, 1, 8, 8)
    assert cluster.evaluate(whole.run)["metrics"] == {
        name: value for name, value in whole.metrics.items() if name.startswith("test/")
    }


@pytest.mark.parametrize(
    ("averaged", "plain", "chosen", "best"),
    [
        ([50.0, 40.0, 45.0], [50.0, 42.0, 41.0], ["averaged", "averaged", "plain"], 1),
        ([50.0, 42.0, 45.0], [50.0, 40.0, float("nan")], ["averaged", "plain", "averaged"], 1),
    ],
)
def test_the_better_of_averaged_and_plain_weights_is_told_of_and_kept(
    averaged, plain, chosen, best, tmp_path, monkeypatch
):
    looks = {"averaged": iter(averaged), "plain": iter(plain)}

    def measure(_: Quality, make: Any) -> dict[str, float]:
        return {"diversity": 1.0, "frechet_distance": next(looks[make.keywords["weights"]])}

    with monkeypatch.context() as patch:
        patch.setattr(Quality, "measure", measure)
        patch.setattr("cluster.adversarial.coordinator.measured", lambda *_, **__: ({}, 0))
        recipe = {**TINY, "train": TINY["train"] | {"epochs": 2}}
        result = coordinate(recipe, tmp_path / "run", LocalPlayers)
    told = lines(tmp_path / "run", "validation")
    assert [line["weights"] for line in told] == chosen
    assert [line["frechet_distance"] for line in told] == [min(pair) for pair in zip(averaged, plain, strict=True)]
    assert (result["best"]["step"], result["best"]["weights"]) == (told[best]["step"], chosen[best])
    assert read_model(Folder(tmp_path / "run")).best == result["best"]
    checkpoints = Checkpoints(Folder(tmp_path / "run") / "checkpoints", keep=2)
    half = checkpoints.read(f"best-{result['best']['step']:010d}.pt")["halves"]["generator"]
    kept, others = half["module"], {n.removeprefix("module."): w for n, w in half["average"].items() if "." in n}
    if chosen[best] == "averaged":
        kept, others = others, kept
    for name, weight in weights(tmp_path / "run").items():
        half_name, _, own = name.partition(".")
        if half_name == "generator":
            assert torch.equal(weight, kept[own])
            assert torch.equal(weight, others[own]) == (not weight.is_floating_point())


def test_weights_that_are_not_averaged_are_nothing_to_choose_from(tmp_path):
    recipe = {**TINY, "train": TINY["train"] | {"epochs": 1} | LARGE}
    result = coordinate(recipe, tmp_path / "run", LocalPlayers)
    assert "weights" not in result["best"]
    assert all("weights" not in line for line in lines(tmp_path / "run", "validation"))


class Losing(LocalPlayers):
    """Halves that are lost in the given segments."""

    lost: tuple[int, ...] = ()
    played = 0

    def play(self, first_step: int, num_steps: int, rate: float) -> Any:
        played = super().play(first_step, num_steps, rate)
        Losing.played += 1
        if Losing.played in self.lost:
            raise PlayersLost("the process of a half has died")
        return played


def coordinate(recipe: Any, run: Path, players: type[LocalPlayers]) -> dict[str, Any]:
    recipe = load_recipe(recipe)
    data = prepared(recipe.data)
    splits = open_splits(data, window=None)
    RunDirectory(Folder(run)).begin(recipe, {})
    coordinator = Coordinator(
        recipe,
        data,
        run=Folder(run),
        features=open_features(data),
        start=lambda: players(recipe, splits, device=torch.device("cpu")),
        replicas=1,
    )
    with closing(coordinator):
        for _ in coordinator.epochs():
            pass
        return coordinator.conclude()


@pytest.mark.parametrize("lost", [(1,), (2,), (3,), (2, 3, 5)])
def test_lost_halves_go_on_from_the_last_checkpoint(whole, tmp_path, lost):
    Losing.lost, Losing.played = lost, 0
    result = coordinate(TINY, tmp_path / "run", Losing)
    assert result["restarts"] == len(lost)
    assert result["metrics"] == whole.metrics
    assert all(torch.equal(ours, weights(whole.run)[name]) for name, ours in weights(tmp_path / "run").items())
    for split in ("train", "validation", "test"):
        mine, theirs = (
            [line | {"time_s": 0, "rows_per_s": 0} for line in lines(r, split)] for r in (tmp_path / "run", whole.run)
        )
        assert mine == theirs


def test_lost_halves_go_on_from_a_checkpoint_within_an_epoch(whole, tmp_path):
    Losing.lost, Losing.played = (3, 8), 0
    recipe = {**TINY, "train": TINY["train"] | {"checkpoint_every_steps": 8}}
    result = coordinate(recipe, tmp_path / "run", Losing)
    assert result["restarts"] == 2
    assert result["metrics"] == whole.metrics
    assert all(torch.equal(ours, weights(whole.run)[name]) for name, ours in weights(tmp_path / "run").items())


def test_halves_that_are_lost_too_often_fail_the_run(tmp_path):
    Losing.lost, Losing.played = (1, 2, 3, 4, 5), 0
    with pytest.raises(RunFailed, match=r"train.max_failures allows \(3\)"):
        coordinate(TINY, tmp_path / "run", Losing)


class Interrupted(LocalPlayers):
    """Halves whose user presses Ctrl-C in the second segment."""

    count = 0

    def play(self, first_step: int, num_steps: int, rate: float) -> Any:
        Interrupted.count += 1
        if Interrupted.count == 2:
            raise KeyboardInterrupt
        return super().play(first_step, num_steps, rate)


def test_an_interrupted_run_is_resumed_to_the_same_end(whole, tmp_path):
    Interrupted.count = 0
    with pytest.raises(KeyboardInterrupt):
        coordinate(TINY, tmp_path / "run", Interrupted)
    assert len(lines(tmp_path / "run", "validation")) == 2
    outcome = cluster.train(TINY, run=str(tmp_path / "run"), resume=True)
    assert outcome.metrics == whole.metrics
    assert all(torch.equal(ours, weights(whole.run)[name]) for name, ours in weights(tmp_path / "run").items())


def test_a_best_generator_newer_than_the_checkpoint_is_no_longer_the_runs(tmp_path, monkeypatch):
    distances = iter([50.0, 40.0, 30.0, 20.0, 60.0, 70.0, 80.0])  # the last before the interruption is the best
    monkeypatch.setattr(Quality, "measure", lambda *_: {"diversity": 1.0, "frechet_distance": next(distances)})
    recipe = {**TINY, "train": TINY["train"] | {"epochs": 4, "checkpoint_every_epochs": 2} | LARGE}
    Interrupted.count = -2
    with pytest.raises(KeyboardInterrupt):
        coordinate(recipe, tmp_path / "run", Interrupted)
    run = Folder(tmp_path / "run")
    assert read_model(run).best["value"] == 20
    result = cluster.train(recipe, run=run.uri, resume=True).result
    assert result["best"]["value"] == 30
    assert read_model(run).best == result["best"]
    steps = result["best"]["step"]
    assert [name for name in (run / "checkpoints").names() if name.startswith("best")] == [f"best-{steps:010d}.pt"]


def test_a_run_goes_on_without_its_newest_checkpoint(tmp_path, monkeypatch):
    # the last look, of rows that are not finite, asks for a rollback
    distances = iter([50.0, 40.0, 30.0, 60.0, float("nan"), 80.0])
    monkeypatch.setattr(Quality, "measure", lambda *_: {"diversity": 1.0, "frechet_distance": next(distances)})
    recipe = {**TINY, "train": TINY["train"] | {"epochs": 3} | LARGE}
    Interrupted.count = -1
    with pytest.raises(KeyboardInterrupt):
        coordinate(recipe, tmp_path / "run", Interrupted)
    folder = Folder(tmp_path / "run") / "checkpoints"
    _, newer = [name for name in folder.names() if name.startswith("step-")]
    folder.delete(newer)
    result = cluster.train(recipe, run=str(tmp_path / "run"), resume=True).result
    assert result["best"]["value"] == 30
    assert read_model(Folder(tmp_path / "run")).best == result["best"]
    assert [rollback["to_step"] for rollback in result["rollbacks"]] == [result["best"]["step"]]


def test_segments_do_not_change_the_result(whole, tmp_path):
    outcome = cluster.train(TINY, run=str(tmp_path / "run"), overrides={"train.checkpoint_every_steps": 5})
    assert outcome.metrics == whole.metrics
    assert [line["rows_digest"] for line in lines(outcome.run, "train") if "rows_digest" in line] == [
        line["rows_digest"] for line in lines(whole.run, "train") if "rows_digest" in line
    ]


def test_patience_ends_a_run(tmp_path):
    # with so small a learning rate nothing gets better than by chance
    changes = {"optimizer.lr": 1e-12, "train.patience": 2, "train.epochs": 30, "train.ema_decay": None}
    outcome = cluster.train(TINY, run=str(tmp_path / "run"), overrides=changes)
    assert outcome.result["stopped_early"]
    assert "no better for 2 epochs" in outcome.result["ended"]
    assert outcome.result["epochs"] < 30


@pytest.mark.parametrize(
    ("patience", "every", "epochs", "ended"),
    [
        (3, 5, 10, "no better for 5 epochs"),  # looks after epochs 5 and 10: the first of them starts the count
        (6, 5, 15, "no better for 10 epochs"),
        (3, 12, 12, None),  # one look, at the end: nothing is ended early
    ],
)
def test_patience_is_asked_at_looks_only(patience, every, epochs, ended, tmp_path, monkeypatch):
    monkeypatch.setattr(Quality, "measure", lambda *_: {"diversity": 1.0, "frechet_distance": 50.0})
    changes = {
        "train.patience": patience,
        "train.epochs": 20 if ended else epochs,
        "train.global_batch_size": 600,
        "adversarial.quality.every_epochs": every,
    }
    outcome = cluster.train(TINY, run=str(tmp_path / "run"), overrides=changes)
    assert outcome.result["epochs"] == epochs
    assert outcome.result["ended"] == ended
    assert outcome.result["stopped_early"] == (ended is not None)


def test_a_loss_that_is_not_finite_is_rolled_back_and_ends_the_run(tmp_path, caplog):
    changes = {"optimizer": {"kind": "sgd", "lr": 1e30}, "objective.loss": "wasserstein", "train.epochs": 6}
    changes |= {"model.discriminator_norm": "layer"}
    outcome = cluster.train(TINY, run=str(tmp_path / "run"), overrides=changes)
    assert [entry["to_step"] for entry in outcome.result["rollbacks"]] == [0, 0, 0]
    assert "NaN or infinite, after 3 of 3 rollbacks" in outcome.result["ended"]
    assert "both halves return to their best, of step 0, with 0.5 times the learning rates" in caplog.text
    assert all(weight.isfinite().all() for weight in weights(outcome.run).values())


def test_feature_vectors_have_no_pictures(tmp_path):
    generator = np.random.default_rng(0)
    columns = {f"x{index}": generator.normal(index, 1 + index, 400) for index in range(3)}
    pq.write_table(pa.table(columns | {"y": np.arange(400) % 2}), tmp_path / "rows.parquet")
    recipe = {
        **TINY,
        "model": {"kind": "gan", "noise_size": 4, "generator_hidden": [16], "discriminator_hidden": [16]},
        "data": {"kind": "parquet", "path": str(tmp_path), "input": list(columns), "target": "y"},
    }
    outcome = cluster.train(recipe, run=str(tmp_path / "run"))
    assert outcome.metrics["test/frechet_distance"] > 0
    assert not Path(outcome.run, "samples").exists()


def test_pairs_are_trained_on(tmp_path):
    recipe = {
        **TINY,
        "model": {"kind": "pix2pix", "width": 4},
        "data": {"kind": "pairs", "edges_of": {"kind": "digits"}},
        "objective": {"kind": "adversarial", "l1_weight": 10},
    }
    outcome = cluster.train(recipe, run=str(tmp_path / "run"))
    assert 0 < outcome.metrics["test/l1"] < 1
    assert lines(outcome.run, "train")[-1]["l1"] < lines(outcome.run, "train")[0]["l1"]


def test_what_does_not_fit_is_refused(tmp_path):
    run = str(tmp_path / "run")
    for changes, message in [
        ({"objective": {"kind": "classification"}}, "set objective.kind to adversarial"),
        ({"model": {"kind": "mlp"}}, "set model.kind to gan, dcgan"),
        ({"train.accumulation": 2}, "train.accumulation: 2 pieces"),
        ({"train.record_grad_norm": True}, "train.record_grad_norm: the halves of a GAN keep none"),
        ({"data.validation_fraction": 0}, "hold out more with data.validation_fraction"),
        ({"adversarial.mode": "fast"}, "adversarial.mode"),
        ({"adversarial.quality.num_images": 3}, "adversarial.quality.num_images"),
    ]:
        with pytest.raises(UserError, match=message):
            cluster.train(TINY, run=run, overrides=changes)
    assert not Path(run).exists()
    with pytest.raises(UserError, match="leave this section out"):
        cluster.train({"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "adversarial": {}}, run=run)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"validation": 0},
            "validation has 0 and train 1258; add rows, or hold out more with data.validation_fraction",
        ),
        ({"validation": 1}, "validation has 1 and train 1258"),
        ({"test": 1}, "test has 1 and train 1258"),
    ],
)
def test_too_few_rows_to_compare_with_are_refused_before_anything_is_written(rows, message, tmp_path, monkeypatch):
    counts = Manifest.rows
    monkeypatch.setattr(Manifest, "rows", lambda manifest, split: rows.get(split, counts(manifest, split)))
    monkeypatch.setattr("cluster.adversarial.features._trained", lambda *_: pytest.fail("a classifier is trained"))
    monkeypatch.setattr("cluster.adversarial.features._place", lambda *_: pytest.fail("a classifier is placed"))
    with pytest.raises(UserError, match=message):
        cluster.train(TINY, run=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# A generator that leaps: it makes the same row whatever the noise, and the discriminator always knows it.
LEAPING = {
    "optimizer.lr": 1.0,
    "adversarial.quality.every_epochs": 1,
    "adversarial.collapse.patience": 3,
}


def test_a_collapse_is_caught_and_what_comes_after_it_is_better(tmp_path, caplog):
    gentle = {"kind": "adam", "lr": 5e-3, "betas": [0.5, 0.999]}
    changes = {"adversarial.discriminator_optimizer": gentle, "adversarial.collapse.learning_rate_factor": 0.05}
    outcome = cluster.train(
        "digits-dcgan", run=str(tmp_path / "run"), overrides={**LEAPING, **changes, "train.epochs": 14}
    )
    (rollback,) = outcome.result["rollbacks"]
    assert rollback["to_step"] == 0
    assert "as diverse as real ones" in rollback["reason"]
    assert rollback["learning_rate_factor"] == 0.05
    assert "both halves return to their best" in caplog.text
    assert outcome.result["ended"] is None
    assert outcome.metrics["test/diversity"] > 0.25
    assert outcome.metrics["test/frechet_distance"] < outcome.result["untrained"]["frechet_distance"] / 2


def test_a_game_that_collapses_again_and_again_is_ended(tmp_path, caplog):
    slow = {"kind": "adam", "lr": 5e-4, "betas": [0.5, 0.999]}
    changes = {"adversarial.discriminator_optimizer": slow, "adversarial.collapse.max_rollbacks": 1}
    outcome = cluster.train(
        "digits-dcgan", run=str(tmp_path / "run"), overrides={**LEAPING, **changes, "train.epochs": 12}
    )
    assert len(outcome.result["rollbacks"]) == 1
    assert outcome.result["stopped_early"]
    assert "after 1 of 1 rollbacks" in outcome.result["ended"]
    assert "training ends here" in caplog.text
