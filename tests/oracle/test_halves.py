"""The halves of a GAN against a plain PyTorch loop, and at an optimum that is known analytically."""

import math

import pytest
import torch
from torch.nn import functional as F

from cluster.adversarial.halves import (
    DISCRIMINATOR,
    GENERATOR,
    DiscriminatorHalf,
    GeneratorHalf,
    Turn,
    noise,
    seed_of,
    turn_of,
)
from cluster.adversarial.players import LocalPlayers, alone
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.training.splits import open_splits
from nn_models.signature import Signature
from tests.unit import made

STEPS = 20
DCGAN = {
    "model": {"kind": "dcgan", "width": 8, "noise_size": 16},
    "data": {"kind": "digits"},
    "objective": {"kind": "adversarial"},
    "optimizer": {"kind": "adam", "lr": 2e-4, "betas": [0.5, 0.999]},
    "train": {"global_batch_size": 64, "epochs": 2},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum over more has another order
    yield
    torch.set_num_threads(threads)


def monolithic(recipe: Recipe, steps: int) -> dict[str, torch.Tensor]:
    """The usual loop of one process: two nets, two optimizers, three backward passes a step."""
    data = prepared(recipe.data)
    splits = open_splits(data, window=None)
    rows = splits.training(recipe, rank=0, world_size=1, device=torch.device("cpu"))
    torch.manual_seed(seed_of(recipe.train.seed, GENERATOR))
    generator = recipe.model.build_generator(data.manifest.signature)
    torch.manual_seed(seed_of(recipe.train.seed, DISCRIMINATOR))
    discriminator = recipe.model.build_discriminator(data.manifest.signature)
    generator_adam, discriminator_adam = (
        torch.optim.Adam(half.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        for half in (generator, discriminator)
    )
    step = 0
    for epoch in range(recipe.train.epochs):
        for (batch,) in rows.batches(epoch, 0):
            if step == steps:
                break
            real = torch.add(torch.tensor(-1.0), batch.stored["input"], alpha=1 / 127.5)  # of bytes
            size = len(real)
            stream = torch.Generator().manual_seed(seed_of(recipe.train.seed, 2, step))
            fake = generator(torch.randn(size, recipe.model.noise_size, generator=stream))

            discriminator_adam.zero_grad()
            (F.softplus(-discriminator(real)).sum() / size).backward()
            (F.softplus(discriminator(fake.detach())).sum() / size).backward()
            discriminator_adam.step()

            generator_adam.zero_grad()
            (F.softplus(-discriminator(fake)).sum() / size).backward()
            generator_adam.step()
            step += 1
    weights = {f"generator.{name}": value for name, value in generator.state_dict().items()}
    return weights | {f"discriminator.{name}": value for name, value in discriminator.state_dict().items()}


def test_twenty_steps_equal_the_plain_loop_bit_for_bit():
    recipe = load_recipe(DCGAN)
    players = LocalPlayers(recipe, open_splits(prepared(recipe.data), window=None), device=torch.device("cpu"))
    players.play(0, 7, 1.0)
    players.play(7, STEPS - 7, 1.0)
    ours, theirs = players.kept("plain"), monolithic(recipe, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("window", [None, 256], ids=["held", "streamed"])
def test_real_images_are_from_minus_one_to_one(window):
    """As they are stored, by arithmetic of its own: 0 to 255 become -1 to 1, wherever the rows come from."""
    recipe = load_recipe(DCGAN, {"data.shuffle_window": window})
    data = prepared(recipe.data)
    rows = open_splits(data, window=window).training(recipe, rank=0, world_size=1, device=torch.device("cpu"))
    stored = torch.from_numpy(made.split_rows(data, "train").columns["input"].values.copy())
    (batch,) = next(rows.batches(0))
    turn = turn_of(recipe, batch, step=0, batch_start=0, factor=1.0)
    # float32, whose last bit depends on the way to the number
    torch.testing.assert_close(turn.real, stored[batch.place.ids] / 127.5 - 1, atol=1e-6, rtol=0)
    assert turn.condition is None


def test_averaged_weights_come_with_averaged_running_statistics():
    """The generator's moving average against one in float64, after each step of the plain weights."""
    recipe = load_recipe(DCGAN, {"train.ema_decay": 0.5})
    players = LocalPlayers(recipe, open_splits(prepared(recipe.data), window=None), device=torch.device("cpu"))
    average = {name: value.double() for name, value in players.kept("plain").items()}
    for step in range(STEPS):
        players.play(step, 1, 1.0)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in players.kept("plain").items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    found = players.kept("averaged")
    statistics = [name for name in found if name.startswith("generator.") and "running" in name]
    assert len(statistics) == 4  # mean and variance of two layers
    for name, value in found.items():
        if name.startswith("generator.") and value.is_floating_point():
            torch.testing.assert_close(value.double(), average[name], atol=1e-6, rtol=1e-6)  # float32, 20 steps
            assert not torch.equal(value, players.kept("plain")[name])


def test_replicas_are_given_the_mean_of_all_running_statistics():
    """Of those beside the moving average too. The other replica is here, and what it has is added by hand."""
    recipe = load_recipe(DCGAN, {"train.ema_decay": 0.5})
    signature = Signature(input_shape=(1, 8, 8), num_outputs=10)
    of_the_other: list[torch.Tensor] = []

    def reduce(tensors):
        for tensor, other in zip(tensors, of_the_other, strict=bool(of_the_other)):
            tensor.add_(other)

    def statistics(half):
        both = [half.weights(which).named_buffers() for which in ("plain", "averaged")]
        return [value for buffers in both for _, value in buffers if value.is_floating_point()]

    halves = [GeneratorHalf(recipe, signature, device=torch.device("cpu"), reduce=reduce) for _ in range(2)]
    for place, half in enumerate(halves):
        turn = Turn(0, torch.zeros(8, 1, 8, 8), None, 8 * place, 16, counts=True, factor=1.0, generator_learns=True)
        half.learn(torch.ones_like(half.make(turn)))
    mine = [value.clone() for value in statistics(halves[0])]
    of_the_other += statistics(halves[1])
    assert len(mine) == 8  # mean and variance of two layers, and their averages
    assert not any(torch.equal(value, other) for value, other in zip(mine, of_the_other, strict=True))
    halves[0].average_buffers(2)
    for found, value, other in zip(statistics(halves[0]), mine, of_the_other, strict=True):
        assert torch.equal(found, (value + other) / 2)


@pytest.mark.parametrize("loss", ["minimax", "non_saturating"])
def test_a_perfect_generator_leaves_the_discriminator_at_its_optimum(loss):
    """Goodfellow et al. 2014, theorem 1: at p_fake = p_data, D = 1/2 and V(D, G) = -ln 4."""
    recipe = load_recipe(
        {
            "model": {"kind": "gan", "noise_size": 1, "discriminator_hidden": [32, 32], "dropout": 0},
            "data": {"kind": "digits"},  # not looked at
            "objective": {"kind": "adversarial", "loss": loss},
            "optimizer": {"kind": "adam", "lr": 1e-3},
        }
    )
    half = DiscriminatorHalf(
        recipe, Signature(input_shape=(1,), num_outputs=1), device=torch.device("cpu"), reduce=alone
    )
    size, steps, last = 512, 1500, 300
    stream = torch.Generator().manual_seed(1)
    value = generator_loss = 0.0
    for step in range(steps):
        real = 3 + 1.5 * torch.randn(size, 1, generator=stream)
        turn = Turn(step, real, None, 0, size, counts=True, factor=1 - step / steps, generator_learns=True)
        fake = 3 + 1.5 * noise(0, turn, 1)  # the generator, fixed at the data's own distribution
        losses = half.see_real(turn)[0] + half.see_fake(turn, fake)[0]
        if step >= steps - last:
            value -= float(losses) / size / last
            generator_loss += float(half.judge(turn, fake)[1]) / size / last
    # what is left: the discriminator is trained on batches, over 300 of which V has a standard error below 1e-3
    assert value == pytest.approx(-math.log(4), abs=5e-3)
    assert abs(generator_loss) == pytest.approx(math.log(2), abs=2e-2)
    points = torch.linspace(0, 6, 50)[:, None]  # within two standard deviations
    assert half.module(points).sigmoid().sub(0.5).abs().max() < 0.05
