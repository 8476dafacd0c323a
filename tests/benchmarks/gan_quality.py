"""Quality of GANs: Frechet distances of held-out rows, each against that of what it has to be better than.

    DATA dcgan / DATA untrained   the DCGAN of the built-in recipe, against the same net with its first weights
    DATA dcgan / DATA dense       against the dense GAN of the built-in recipe
    DATA dcgan / DATA floor       against as many real training rows: what perfect rows would reach
    conditional labels            share of rows that the classifier takes for what they were to be; the other one is 1
    pix2pix / identity            the built-in recipe, against the edges themselves taken for the images
    pix2pix / L1 alone            against the same generator, trained as long, that learns from the L1 distance only

L1 alone is the same recipe with an l1_weight of a million. Adam takes the scale out of a gradient again, so the rate is
the same, and the adversarial term is left with ten thousand times less than in the paper.

DATA is digits, and with `--fashion 1` fashion (Fashion-MNIST) too: a quarter of an hour more. `figures` has all metrics
of each.
"""

from collections.abc import Mapping
from typing import Any

import torch
from measuring import Case, options, publish, scratch

import cluster
from cluster.adversarial.features import open_features
from cluster.adversarial.halves import described, sample
from cluster.adversarial.quality import Make, Quality
from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe

FRECHET = "frechet_distance"
L1_ALONE = {"objective.l1_weight": 1e6, "adversarial.collapse.max_accuracy": 1.0}  # its discriminator may win
# what the DCGAN's distance is to be at most as a share of these; 8x8 pixels are few enough for dense layers
WANTED = {
    "digits": {"untrained": 0.1, "dense": 0.9, "floor": 4},
    "fashion": {"untrained": 0.1, "dense": 0.67, "floor": 30},
}
Metrics = dict[str, float]


def trained(recipe: str, seed: int, overrides: Mapping[str, Any] = {}) -> Metrics:
    """The metrics on the test split of the best generator, and what training took."""
    with scratch() as folder:
        outcome = cluster.train(recipe, run=str(folder / "run"), overrides={"train.seed": seed, **overrides})
    tested = {name.removeprefix("test/"): value for name, value in outcome.metrics.items() if name.startswith("test/")}
    return {**tested, "rollbacks": len(outcome.result["rollbacks"]), "wall_s": outcome.result["wall_s"]}


def measured(recipe: str, make: Make) -> Metrics:
    """The metrics on the test split of any other way to make rows."""
    loaded = load_recipe(recipe)
    data = prepared(loaded.data)
    return Quality(open_features(data), data, recipe=loaded, split="test").measure(make)


def untrained(recipe: str, seed: int) -> Metrics:
    """The same of a generator with its first weights."""
    loaded = load_recipe(recipe)
    torch.manual_seed(seed)
    generator = described(loaded)[0].build_generator(prepared(loaded.data).manifest.signature)
    return measured(recipe, lambda source, condition: sample(generator, source, condition, device=torch.device("cpu")))


def identity(recipe: str) -> Metrics:
    """The same of the images given, taken for those to be made."""

    def make(source: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        assert condition is not None
        return condition

    return measured(recipe, make)


def main() -> None:
    chosen = options(__doc__, seeds=1, fashion=0)
    seeds = range(chosen.seeds)
    sets = ["digits", "fashion"] if chosen.fashion else ["digits"]
    figures: dict[str, list[Metrics]] = {}
    for data in sets:
        figures[f"{data} dcgan"] = [trained(f"{data}-dcgan", seed) for seed in seeds]
        figures[f"{data} dense"] = [trained(f"{data}-gan", seed) for seed in seeds]
        figures[f"{data} untrained"] = [untrained(f"{data}-dcgan", seed) for seed in seeds]
        figures[f"{data} floor"] = [{FRECHET: found["frechet_floor"]} for found in figures[f"{data} dcgan"]]
    figures["conditional"] = [trained("digits-conditional-gan", seed) for seed in seeds]
    figures["pix2pix"] = [trained("fashion-pix2pix", seed) for seed in seeds]
    figures["L1 alone"] = [trained("fashion-pix2pix", seed, L1_ALONE) for seed in seeds]
    figures["identity"] = [identity("fashion-pix2pix")] * chosen.seeds

    def case(name: str, other: str, wanted: float) -> Case:
        pairs = zip(figures[name], figures[other], strict=True)
        return Case(f"{name} / {other}", f"<= {wanted}", "distance", [(a[FRECHET], b[FRECHET]) for a, b in pairs])

    cases = [
        case(f"{data} dcgan", f"{data} {other}", wanted) for data in sets for other, wanted in WANTED[data].items()
    ]
    agreement = [(found["label_agreement"], 1.0) for found in figures["conditional"]]
    cases += [
        Case("conditional labels", ">= 0.9", "share of rows", agreement),
        case("pix2pix", "identity", 0.1),
        case("pix2pix", "L1 alone", 0.5),
    ]
    rounded = {
        name: [{metric: round(value, 4) for metric, value in found.items()} for found in several]
        for name, several in figures.items()
    }
    publish("gan_quality", cases, seeds=chosen.seeds, figures=rounded)


if __name__ == "__main__":
    main()
