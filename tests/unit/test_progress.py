"""What a run's progress says: metrics by their short words where these are declared, by their names otherwise."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jobs.commands.progress import Progress
from nn_models.spec import validate
from nn_models.zoo import AnyModelSpec, AnyObjectiveSpec


def recipe(model: str, **objective: Any) -> Any:
    """As much of a recipe as progress asks."""
    return SimpleNamespace(
        model=validate(AnyModelSpec, {"kind": model}), objective=validate(AnyObjectiveSpec, objective)
    )


def line(split: str, **metrics: float) -> dict[str, Any]:
    place = {"step": 9, "epoch": 0, "split": split, "time_s": 1.0, "learning_rate": 1e-3, "rows_per_s": 9e3}
    return {**place, **metrics, "end_of_epoch": split == "train"}


@pytest.fixture
def bar(monkeypatch):
    """What stands on the bar of a wide terminal at last."""

    def run(*lines: dict[str, Any], recipe: Any = None) -> str:
        seen = io.StringIO()
        wide = lambda **_: Console(file=seen, force_terminal=True, width=200)  # noqa: E731
        monkeypatch.setattr("jobs.commands.progress.Console", wide)
        with Progress("run", epochs=4, recipe=recipe) as progress:
            for one in lines:
                progress(one)
        return seen.getvalue()

    return run


ONE_NET = [line("train", loss=0.25, accuracy=0.5), line("validation", loss=12.5, accuracy=0.75)]
classification = pytest.mark.parametrize("known", [None, recipe("mlp", kind="classification")])


@classification
def test_one_net_on_a_terminal(bar, known):
    assert "validation loss 12.5000  accuracy 0.7500" in bar(*ONE_NET, recipe=known)


@classification
def test_one_net_in_lines(capsys, known):
    progress = Progress("run", epochs=4, recipe=known)
    for one in ONE_NET:
        progress(one)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/4    train      loss 0.2500  accuracy 0.5000  (1.0 s)",
        "epoch 1/4    validation loss 12.5000  accuracy 0.7500  (1.0 s)",
    ]


LOSSES = line("train", generator_loss=0.5, discriminator_loss=1.25, real_accuracy=0.75, fake_accuracy=1.0)


@pytest.mark.parametrize(
    ("model", "look", "leading"),
    [
        ("dcgan", {"diversity": 0.5, "kernel_distance": 0.1, "frechet_distance": 168.62}, "Frechet 168.6"),
        ("dcgan", {"diversity": 0.5}, "diversity 0.500"),  # images without labels
        ("conditional_gan", {"diversity": 0.5, "frechet_distance": 2.5, "label_agreement": 0.9}, "Frechet 2.500"),
        ("pix2pix", {"diversity": 0.5, "l1": 0.125}, "L1 0.125"),
        ("pix2pix", {"diversity": 0.5, "l1": 0.125, "frechet_distance": 2.5}, "Frechet 2.500"),
    ],
)
def test_a_gan_tells_first_what_it_is_chosen_by(bar, model, look, leading):
    shown = bar(line("validation", **look), LOSSES, recipe=recipe(model, kind="adversarial"))
    assert f"{leading}  losses 0.500 / 1.250 " in shown


@pytest.mark.parametrize("known", [None, recipe("pix2pix", kind="adversarial")])
def test_a_line_has_the_short_words_in_their_order(capsys, known):
    progress = Progress("run", epochs=4, recipe=known)
    progress(LOSSES)
    progress(line("validation", l1=0.5, diversity=0.25, kernel_floor=0.1, frechet_floor=1.5, frechet_distance=30.25))
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/4    train      generator 0.500  discriminator 1.250  right on real 0.750  on made 1.000  (1.0 s)",
        "epoch 1/4    validation Frechet 30.2  floor 1.500  diversity 0.250  L1 0.500  (1.0 s)",
    ]


def test_metrics_that_nobody_declares(capsys):
    Progress("run", epochs=4)(line("validation", perplexity=12.0, grades=0.5))
    assert "validation perplexity 12.0000  grades 0.5000" in capsys.readouterr().err
