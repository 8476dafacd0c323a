"""The halves of a GAN against a plain PyTorch loop, and at an optimum that is known analytically."""

import math

import pytest
import torch
from torch.nn import functional as F

from cluster.adversarial.halves import DISCRIMINATOR, GENERATOR, DiscriminatorHalf, Turn, noise, seed_of
from cluster.adversarial.players import LocalPlayers, alone
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.training.splits import open_splits
from nn_models.signature import Signature

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
    mean, std = data.manifest.mean[0], data.manifest.std[0]
    step = 0
    for epoch in range(recipe.train.epochs):
        for batch in rows.batches(epoch, 0):
            if step == steps:
                break
            pixels = ((batch.inputs.double() * std + mean) * 255).round()  # back to the stored bytes
            real = torch.add(torch.tensor(-1.0), pixels.to(torch.uint8), alpha=1 / 127.5)
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
    ours, theirs = players.kept(), monolithic(recipe, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
