"""Transforms: torchvision's pixels for given parameters, and parameters as often as torchvision draws them."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cluster.data.transforms import (
    ColorJitter,
    Erasing,
    HorizontalFlip,
    Parameters,
    RandomCrop,
    ResizedCrop,
    Rotation,
    Transform,
)
from nn_models import noise

pytestmark = pytest.mark.filterwarnings("error")

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 17, 23), (6, 9, 8)]
UNLIKELY = 1e-3  # keys and torchvision's seed are fixed, so each comparison comes out the same each time


def images(rows: int, shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """Smooth images and noise, half of the rows each, with black and white among their pixels."""
    generator = np.random.default_rng(seed)
    pixels = torch.from_numpy(generator.integers(0, 256, (rows, *shape), dtype=np.uint8))
    coarse = torch.from_numpy(generator.integers(-80, 336, (rows // 2, shape[0], 4, 4))).float()
    pixels[: rows // 2] = F.resize(coarse, list(shape[1:])).clamp(0, 255).to(torch.uint8)
    return pixels


def drawn(transform: Transform, rows: int, *, stream: int = 0) -> Parameters:
    return transform.draw(noise.uniform(torch.arange(rows), transform.numbers, stream=stream))


# -- the same pixels -------------------------------------------------------------------------------------------------


def row_by_row(change: Callable[..., Tensor], pixels: Tensor, parameters: Parameters) -> Tensor:
    """What torchvision's function makes of each image with the row's parameters as Python's numbers."""
    rows = zip(*[values.tolist() for values in parameters.values()], strict=True)
    changed = [
        change(image, **dict(zip(parameters, values, strict=True))) for image, values in zip(pixels, rows, strict=True)
    ]
    return torch.stack(changed)


def flipped(image: Tensor, flip: bool) -> Tensor:
    return F.horizontal_flip(image) if flip else image


def jittered(image: Tensor, brightness: float, contrast: float, saturation: float, order: int) -> Tensor:
    changes = {
        "b": lambda image: F.adjust_brightness(image, brightness),
        "c": lambda image: F.adjust_contrast(image, contrast),
        "s": lambda image: F.adjust_saturation(image, saturation),
    }
    for change in ("bcs", "bsc", "csb", "cbs", "sbc", "scb")[order]:
        image = changes[change](image)
    return image


def erased(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return F.erase(image, top, left, height, width, torch.zeros(1, 1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["horizontal_flip", "random_crop", "rotation", "erasing"])
def test_pixels_that_are_moved_or_blanked_are_torchvisions(kind, shape):
    transform, theirs = {
        "horizontal_flip": (HorizontalFlip(0.5), flipped),
        "random_crop": (
            RandomCrop(5),
            lambda image, top, left: F.crop(F.pad(image, [5] * 4), top, left, *shape[1:]),
        ),
        "rotation": (Rotation(200.0), F.rotate),
        "erasing": (Erasing(shape, 0.9), erased),
    }[kind]
    pixels = images(300, shape)
    parameters = drawn(transform, 300)
    assert torch.equal(transform.apply(pixels, parameters), row_by_row(theirs, pixels, parameters))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quarter_turns_are_torchvisions(shape):
    angles = torch.tensor([0.0, 90, 180, 270, 360, -90, -180, 45, -45, 1e-5])
    pixels = images(10, shape)
    assert torch.equal(Rotation(1).apply(pixels, {"angle": angles}), row_by_row(F.rotate, pixels, {"angle": angles}))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] in (1, 3)], ids=str)
def test_colours_are_torchvisions(shape):
    transform = ColorJitter(0.6, 1.5, 1.5)  # contrast and saturation down to none
    pixels = images(600, shape)
    parameters = drawn(transform, 600)
    assert parameters["order"].unique().tolist() == list(range(6))
    assert parameters["contrast"].min() < 0.02
    assert torch.equal(transform.apply(pixels, parameters), row_by_row(jittered, pixels, parameters))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_enlarged_rectangle_is_torchvisions(shape):
    transform = ResizedCrop(shape, 0.05)
    pixels = images(300, shape)
    parameters = drawn(transform, 300)
    changed = transform.apply(pixels, parameters).int()

    def enlarged(image: Tensor, **rectangle: int) -> Tensor:
        return F.resized_crop(image, size=list(shape[1:]), antialias=True, **rectangle)

    # As torchvision computes where the processor has no vectors of bytes, and on a GPU: in floats, rounded once. Both
    # round exact halves, which are frequent in images of few pixels, by chance.
    floats = row_by_row(enlarged, pixels.float(), parameters).round()
    assert (changed - floats).abs().max() <= 1
    assert ((changed - floats) != 0).float().mean() < 0.01  # 0.004 seen
    # As it computes otherwise: columns are rounded to bytes before the rows are made, which here are not.
    off = (changed - row_by_row(enlarged, pixels, parameters).int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 0.2  # 0.18 seen


def test_the_whole_image_as_a_rectangle_is_the_image():
    for shape in [*SHAPES, (1, 301, 7)]:
        whole = {name: torch.full((4,), size) for name, size in zip(("height", "width"), shape[1:], strict=True)}
        corner = {name: torch.zeros(4, dtype=torch.int64) for name in ("top", "left")}
        assert torch.equal(ResizedCrop(shape, 0.5).apply(images(4, shape), corner | whole), images(4, shape))


# -- as often --------------------------------------------------------------------------------------------------------


def uniform_outcomes(outcomes: Tensor, count: int) -> None:
    """All of the integers from 0 to count - 1, equally often."""
    assert stats.chisquare(torch.bincount(outcomes, minlength=count).numpy()).pvalue > UNLIKELY


def as_often(ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    """The same outcomes, equally often: each within 4 % of all draws, and all as near as chance has them.

    Those seen fewer than ten times count as one.
    """
    one, another = Counter(ours), Counter(theirs)
    total = sum(one.values())
    assert total == sum(another.values())
    frequent = [(one[outcome], another[outcome]) for outcome, count in (one + another).items() if count >= 10]
    assert frequent
    rest = (total - sum(own for own, _ in frequent), total - sum(other for _, other in frequent))
    assert max(abs(own - other) for own, other in (*frequent, rest)) < 0.04 * total
    table = [*frequent, rest] if sum(rest) else frequent
    assert stats.chi2_contingency(table).pvalue > UNLIKELY


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flips_are_as_frequent_as_asked(p):
    share = drawn(HorizontalFlip(p), 10_000)["flip"].float().mean()
    assert abs(share - p) <= 4 * (p * (1 - p) / 10_000) ** 0.5  # four deviations


@pytest.mark.parametrize("padding", [1, 4, 1024])
def test_crops_lie_everywhere_equally_often(padding):
    places = 2 * padding + 1
    top, left = drawn(RandomCrop(padding), 100_000).values()
    uniform_outcomes(top, places)
    uniform_outcomes(left, places)
    if padding < 10:
        uniform_outcomes(top * places + left, places**2)


def test_angles_and_factors_are_uniform():
    angle = drawn(Rotation(30.0), 20_000)["angle"]
    assert stats.kstest(angle.numpy(), stats.uniform(-30, 60).cdf).pvalue > UNLIKELY
    jitter = drawn(ColorJitter(0.2, 0.7, 1.6), 20_000)
    for name, low, high in (("brightness", 0.8, 1.2), ("contrast", 0.3, 1.7), ("saturation", 0.0, 2.6)):
        assert stats.kstest(jitter[name].numpy(), stats.uniform(low, high - low).cdf).pvalue > UNLIKELY
    uniform_outcomes(jitter["order"], 6)
    together = torch.stack([jitter["brightness"], jitter["contrast"], jitter["saturation"], jitter["order"]])
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 4 / 20_000**0.5  # four deviations


def test_torchvision_jitters_as_much_and_in_the_same_orders():
    torch.manual_seed(0)
    theirs = v2.ColorJitter(0.2, 0.7, 1.6)
    made = [theirs.make_params([]) for _ in range(3000)]
    ours = drawn(ColorJitter(0.2, 0.7, 1.6), 3000)
    for name in ("brightness", "contrast", "saturation"):
        factors = [parameters[f"{name}_factor"] for parameters in made]
        assert stats.ks_2samp(ours[name].numpy(), factors).pvalue > UNLIKELY
    orders = ["".join("bcs"[place] for place in parameters["fn_idx"].tolist() if place < 3) for parameters in made]
    as_often([("bcs", "bsc", "csb", "cbs", "sbc", "scb")[order] for order in ours["order"].tolist()], orders)


RECTANGLES = {
    "square": (3, 6, 6),
    "wide": (1, 5, 7),
    "so wide that some tries fail": (1, 6, 9),
    "so wide that most fail, and the middle is taken": (1, 4, 13),
    "so high that most fail": (1, 13, 5),
    "large": (3, 40, 32),
}


def rectangles(parameters: Parameters) -> list[tuple[int, ...]]:
    names = ("top", "left", "height", "width")
    return list(zip(*[parameters[name].tolist() for name in names], strict=True))


def compare_rectangles(ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> None:
    coarse = max(map(max, theirs)) // 12 + 1  # pixels that count as one, so that outcomes of all four are few enough
    as_often(*([tuple(value // coarse for value in row) for row in rows] for rows in (ours, theirs)))
    for one, another in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        as_often(one, another)


@pytest.mark.parametrize("name", RECTANGLES)
@pytest.mark.parametrize("min_area", [0.1, 0.8])
def test_rectangles_are_cut_out_as_often_as_by_torchvision(name, min_area):
    shape = RECTANGLES[name]
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(shape[1:], scale=(min_area, 1.0))
    image = torch.zeros(shape)
    made = [theirs.make_params([image]) for _ in range(3000)]
    expected = [tuple(parameters[part] for part in ("top", "left", "height", "width")) for parameters in made]
    compare_rectangles(rectangles(drawn(ResizedCrop(shape, min_area), 3000)), expected)


def test_torchvision_gives_up_after_as_many_tries():
    shape, rows = (1, 4, 13), 8000  # one try in ten fits
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(shape[1:], scale=(0.33, 1.0))
    image, middle = torch.zeros(shape), (0, 4, 4, 5)
    made = [tuple(theirs.make_params([image]).values()) for _ in range(rows)]
    ours = rectangles(drawn(ResizedCrop(shape, 0.33), rows))
    shares = [sum(rectangle == middle for rectangle in every) / rows for every in (ours, made)]
    # four deviations, 3 %; another try more or less would be another 4 %
    assert abs(shares[0] - shares[1]) < 4 * (2 * 0.38 * 0.62 / rows) ** 0.5


@pytest.mark.parametrize("name", RECTANGLES)
def test_rectangles_are_blanked_as_often_as_by_torchvision(name):
    shape = RECTANGLES[name]
    torch.manual_seed(0)
    theirs = v2.RandomErasing(1.0)
    image = torch.zeros(shape)
    made = [theirs.make_params([image]) for _ in range(3000)]
    assert all(parameters["v"] is not None for parameters in made)
    expected = [tuple(parameters[part] for part in "ijhw") for parameters in made]
    compare_rectangles(rectangles(drawn(Erasing(shape, 1.0), 3000)), expected)


def test_where_no_rectangle_fits_nothing_is_blanked():
    transform = Erasing((1, 1, 6), 1.0)
    parameters = drawn(transform, 500)
    pixels = images(500, (1, 1, 6))
    torch.manual_seed(0)
    theirs = [v2.RandomErasing(1.0)(image) for image in pixels]
    changed = transform.apply(pixels, parameters)
    assert torch.equal(changed, pixels)
    assert torch.equal(torch.stack(theirs), pixels)
    share = (drawn(Erasing((1, 8, 8), 0.3), 10_000)["height"] > 0).float().mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 10_000) ** 0.5  # four deviations
