"""The halves of a GAN as actors: equal to one process, whatever is killed, and nothing is left behind."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch

import cluster
from cluster.adversarial.actor_players import ActorPlayers
from cluster.adversarial.players import LocalPlayers
from cluster.data.keys import digest_text
from cluster.data.prepare import prepared
from cluster.errors import RunFailed
from cluster.recipe.loading import load_recipe
from cluster.runtime import RaySession
from cluster.training.splits import open_splits
from nn_models import UserError
from tests.oracle.test_halves import DCGAN, STEPS, monolithic
from tests.ray.faults import all_is_free, digests, killing, processes, steps_done, wait_for, weights

TRAINED = {**DCGAN, "train": {"global_batch_size": 64, "epochs": 12, "ema_decay": 0.9, "checkpoint_every_steps": 8}}
# no batch normalisation: each row by itself, so that two replicas see what one would
DENSE = {**DCGAN, "model": {"kind": "gan", "generator_hidden": [32], "discriminator_hidden": [32], "dropout": 0}}
WASSERSTEIN = {**DENSE, "objective": {"kind": "adversarial", "loss": "wasserstein", "discriminator_steps": 2}}
PIPELINED = {**DCGAN, "adversarial": {"mode": "pipelined"}}
AVERAGED = {**DCGAN, "train": DCGAN["train"] | {"ema_decay": 0.9}}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ACTORS = ("GeneratorActor", "DiscriminatorActor")


def nothing_left(ray) -> bool:
    return not processes(*ACTORS) and all_is_free(ray)


def played(ray, recipe, *, pairs=None, steps=STEPS, kept="plain"):
    """The weights of both halves after so many steps, in actors or (without `pairs`) in this process."""
    recipe = load_recipe(recipe)
    splits = open_splits(prepared(recipe.data), window=None)
    if pairs is None:
        players = LocalPlayers(recipe, splits, device=torch.device("cpu"))
    else:
        players = ActorPlayers(recipe, splits, pairs=pairs, bundle={"CPU": 1}, session=RaySession(ray, embedded=True))
    try:
        sums = players.play(0, steps - 3, 1.0), players.play(steps - 3, 3, 1.0)
        return players.kept(kept), sums
    finally:
        players.close()


def test_twenty_steps_equal_the_plain_loop_bit_for_bit(ray):
    ours, _ = played(ray, DCGAN, pairs=1)
    theirs = monolithic(load_recipe(DCGAN), STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    wait_for(lambda: nothing_left(ray))


@pytest.mark.parametrize(("recipe", "kept"), [(PIPELINED, "plain"), (WASSERSTEIN, "plain"), (AVERAGED, "averaged")])
def test_actors_do_what_one_process_does(ray, recipe, kept):
    (ours, our_sums), (theirs, their_sums) = played(ray, recipe, pairs=1, kept=kept), played(ray, recipe, kept=kept)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for mine, other in zip(our_sums, their_sums, strict=True):
        assert mine.sums.tolist() == other.sums.tolist()
        assert digest_text(mine.digest) == digest_text(other.digest)


# The last bias of a Wasserstein critic has the gradient 0 but for rounding, which Adam would blow up to whole steps.
@pytest.mark.parametrize("recipe", [DENSE, {**WASSERSTEIN, "optimizer": {"kind": "sgd", "lr": 0.01}}])
def test_two_replicas_of_half_the_batch_equal_one(ray, recipe):
    (ours, our_sums), (theirs, their_sums) = played(ray, recipe, pairs=2), played(ray, recipe)
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=0, atol=1e-6), name
    for mine, other in zip(our_sums, their_sums, strict=True):
        assert digest_text(mine.digest) == digest_text(other.digest)
        assert mine.sums == pytest.approx(other.sums, rel=1e-4)


@pytest.fixture(scope="module")
def undisturbed(ray, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cluster.train(TRAINED, run=str(tmp_path_factory.mktemp("whole") / "run"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("half", "step"), [("Generator", 20), ("Discriminator", 1), ("Generator", 150)])
def test_a_killed_half_changes_nothing(ray, undisturbed, tmp_path, half, step):
    run = tmp_path / "run"
    with killing(f"{half}Actor", when=lambda: steps_done(run) >= step):
        outcome = cluster.train(TRAINED, num_workers=1, run=str(run))
    assert outcome.result["restarts"] == 1
    assert all(torch.equal(ours, weights(undisturbed.run)[name]) for name, ours in weights(run).items())
    assert outcome.metrics == undisturbed.metrics
    assert digests(run) == digests(undisturbed.run)
    wait_for(lambda: nothing_left(ray))


def test_a_half_that_is_told_to_end_is_saved_and_started_elsewhere(ray, undisturbed, tmp_path):
    run = tmp_path / "run"
    with killing("DiscriminatorActor", when=lambda: steps_done(run) >= 20, by=signal.SIGTERM):
        outcome = cluster.train(TRAINED, num_workers=1, run=str(run))
    assert (outcome.result["restarts"], outcome.result["preemptions"]) == (0, 1)
    assert 0 < outcome.result["lost_s"] < outcome.result["wall_s"]
    assert all(torch.equal(ours, weights(undisturbed.run)[name]) for name, ours in weights(run).items())
    assert outcome.metrics == undisturbed.metrics
    assert digests(run) == digests(undisturbed.run)
    wait_for(lambda: nothing_left(ray))


def test_a_half_killed_while_it_starts_is_started_again(ray, undisturbed, tmp_path):
    with killing("GeneratorActor"):
        outcome = cluster.train(TRAINED, num_workers=1, run=str(tmp_path / "run"))
    assert outcome.result["restarts"] == 1
    assert outcome.metrics == undisturbed.metrics
    wait_for(lambda: nothing_left(ray))


def test_halves_that_die_again_and_again_fail_the_run(ray, tmp_path):
    run = tmp_path / "run"
    stop = threading.Event()

    def kill():
        while not stop.wait(0.2):
            for process in processes(*ACTORS):
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(RunFailed, match="max_failures"):
            cluster.train(TRAINED, num_workers=1, run=str(run), overrides={"train.max_failures": 1})
    finally:
        stop.set()
        killer.join()
    assert json.loads(Path(run, "result.json").read_text())["status"] == "failed"
    wait_for(lambda: nothing_left(ray))


def test_what_cannot_be_is_refused(ray, tmp_path):
    with pytest.raises(UserError, match="cannot change in number"):
        cluster.train(DCGAN, num_workers=(1, 2), run=str(tmp_path / "elastic"))
    with pytest.raises(UserError, match="5 pairs of halves, so 10 actors of 1 CPU each can never be placed"):
        cluster.train(DCGAN, num_workers=5, run=str(tmp_path / "many"), overrides={"train.cpus_per_worker": 1})
    with pytest.raises(UserError, match="1 pair of halves, so 2 actors of 1 CPU and 1 GPU each"):
        cluster.train(DCGAN, num_workers=1, use_gpu=True, run=str(tmp_path / "gpu"))
