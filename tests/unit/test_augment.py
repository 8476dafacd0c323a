"""Augmentation: whole batches changed as torchvision changes images, each row by its own key."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor
from torchvision.transforms import v2

from cluster.data import augment
from cluster.data.augment import AnyAugmentSpec, Augmentation
from cluster.data.keys import row_keys
from nn_models.errors import UserError
from tests.unit.test_transforms import as_often, images, uniform_outcomes

pytestmark = pytest.mark.filterwarnings("error")

KINDS = ("horizontal_flip", "random_crop", "rotation", "resized_crop", "color_jitter", "erasing")
ALL: list[dict[str, Any]] = [{"kind": kind} for kind in KINDS]


def augmentation(sections: list[dict[str, Any]] = ALL, shape: tuple[int, ...] = (3, 6, 5)) -> Augmentation:
    return Augmentation(TypeAdapter(list[AnyAugmentSpec]).validate_python(sections), shape=shape)


def keys(rows: int, *, seed: int = 0, epoch: int = 0) -> Tensor:
    return torch.from_numpy(row_keys(seed, epoch, np.arange(rows)))


@pytest.mark.parametrize("kind", ["horizontal_flip", "random_crop", "erasing"])
def test_one_image_becomes_the_same_images_as_often(kind):
    shape = (1, 3, 4)
    image = (torch.arange(12, dtype=torch.uint8) + 1).view(shape)
    section, theirs = {
        "horizontal_flip": ({}, v2.RandomHorizontalFlip()),
        "random_crop": ({"padding": 2}, v2.RandomCrop(shape[1:], padding=2)),
        "erasing": ({}, v2.RandomErasing(0.25)),
    }[kind]
    torch.manual_seed(0)
    expected = [tuple(theirs(image).flatten().tolist()) for _ in range(2000)]
    changed = augmentation([{"kind": kind, **section}], shape)(image.expand(2000, *shape), keys(2000))
    as_often([tuple(row) for row in changed.flatten(1).tolist()], expected)


# -- each row by its own key -----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True), seed=st.integers(0, 2**32), grey=st.booleans())
def test_a_row_becomes_the_same_in_any_batch(cuts, seed, grey):
    shape = (1, 8, 7) if grey else (3, 6, 5)
    pixels, own = images(40, shape), keys(40, seed=seed)
    change = augmentation(shape=shape)
    whole = change(pixels, own)
    edges = [0, *sorted(cuts), 40]
    pieces = [change(pixels[a:b], own[a:b]) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), whole)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(change(pixels[order], own[order]), whole[order])


def test_a_batch_too_large_for_the_cache_is_cut(monkeypatch):
    pixels, own = images(50, (3, 6, 5)), keys(50)
    whole = augmentation()(pixels, own)
    for pixels_at_once in (1, 100, 1000):
        monkeypatch.setattr(augment, "PIXELS_AT_ONCE", pixels_at_once)
        assert torch.equal(augmentation()(pixels, own), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_other_keys_are_changed_otherwise(kind):
    pixels = images(1, (3, 32, 32)).expand(200, -1, -1, -1)
    section = {"kind": kind} | ({"p": 1.0} if kind == "erasing" else {})
    changed = augmentation([section], (3, 32, 32))(pixels, keys(200)).flatten(1)
    assert changed.dtype == torch.uint8
    distinct = len(changed.unique(dim=0))
    # 81 crops, of which 200 rows miss 7; some hundred images by up to 10 degrees either way; of others so many that
    # hardly two rows have the same
    expected = {"horizontal_flip": range(2, 3), "random_crop": range(65, 82), "rotation": range(100, 201)}
    assert distinct in expected.get(kind, range(180, 201))


def test_seed_epoch_and_row_make_the_key():
    image = images(1, (3, 32, 32))
    change = augmentation(shape=(3, 32, 32))
    ids = np.array([7])
    places = [(0, 0, ids), (1, 0, ids), (0, 1, ids), (0, 0, ids + 1)]
    changed = [change(image, torch.from_numpy(row_keys(*place))) for place in places]
    assert len({tuple(one.flatten().tolist()) for one in changed}) == 4
    assert torch.equal(change(image, torch.from_numpy(row_keys(*places[0]))), changed[0])


def test_what_comes_later_does_not_change_what_is_drawn_before():
    for count in range(1, 6):
        some, more = augmentation(ALL[:count]).draw(keys(20)), augmentation(ALL).draw(keys(20))
        for one, another in zip(some, more[:count], strict=True):
            assert all(torch.equal(one[name], another[name]) for name in one)


def test_two_transforms_of_one_kind_draw_their_own_numbers():
    twice = augmentation([{"kind": "random_crop"}] * 2, (3, 8, 8)).draw(keys(20_000))
    uniform_outcomes(twice[0]["top"] * 9 + twice[1]["top"], 81)


def test_transforms_come_in_the_order_of_the_recipe():
    pixels, own = images(30, (3, 6, 5)), keys(30)
    change = augmentation()
    expected = pixels
    for section, parameters in zip(ALL, change.draw(own), strict=True):
        (spec,) = TypeAdapter(list[AnyAugmentSpec]).validate_python([section])
        expected = spec.build((3, 6, 5)).apply(expected, parameters)
    assert torch.equal(change(pixels, own), expected)


def test_neither_the_images_nor_torchs_generators_are_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the GPU is seeded"))
    pixels = images(10, (3, 6, 5))
    before, state = pixels.clone(), torch.get_rng_state()
    augmentation()(pixels, keys(10))
    for section in ALL:
        changed = augmentation([section])(pixels, keys(10))
        changed.zero_()  # a copy even where nothing was changed
    assert torch.equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), state)


# -- kinds of images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["horizontal_flip", "random_crop", "rotation", "resized_crop"])
@pytest.mark.parametrize("channels", [(3, 3), (1, 3), (2, 5)])
def test_images_laid_on_top_of_each_other_move_as_one(kind, channels):
    one, another = (images(20, (count, 9, 8), seed=count) for count in channels)
    change = augmentation([{"kind": kind}], (channels[0], 9, 8))
    both = change(torch.cat((one, another), 1), keys(20))
    assert torch.equal(both[:, : channels[0]], change(one, keys(20)))
    assert torch.equal(both[:, channels[0] :], change(another, keys(20)))


def test_saturation_means_nothing_to_grey_images():
    pixels = images(20, (1, 9, 8))
    change = augmentation([{"kind": "color_jitter", "brightness": 0, "contrast": 0, "saturation": 0.9}], (1, 9, 8))
    assert torch.equal(change(pixels, keys(20)), pixels)


def test_images_without_colours_have_no_colours_to_change():
    with pytest.raises(UserError, match=r"data.augment: color_jitter changes grey or RGB images, not 2 channels"):
        augmentation([{"kind": "color_jitter"}], (2, 9, 8))


def test_images_may_lie_in_memory_in_any_order():
    pixels = images(20, (3, 6, 5))
    expected = augmentation()(pixels, keys(20))
    assert torch.equal(augmentation()(pixels.to(memory_format=torch.channels_last), keys(20)), expected)
    assert torch.equal(augmentation()(torch.cat((pixels, pixels), 1)[:, 3:], keys(20)), expected)
