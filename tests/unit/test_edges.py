"""Edges: how steep the luminance is at each pixel, as SciPy says of Pillow's grey."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

from cluster.data.sources.pixels import edges

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("colour", [(0,), (93,), (255,), (0, 0, 0), (200, 3, 77), (255, 255, 255)])
def test_a_flat_image_has_no_edges(colour):
    image = np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (len(colour), 5, 7))
    assert not edges(image[None]).any()


def test_a_step_is_a_line_and_black_to_white_is_255():
    image = np.zeros((1, 6, 8), np.uint8)
    image[:, :, 4:] = 255
    upright, lying = edges(np.stack([image, image]))[0, 0], edges(image.transpose(0, 2, 1)[None])[0, 0]
    assert (upright == [0, 0, 0, 255, 255, 0, 0, 0]).all()  # to the image's very border
    np.testing.assert_array_equal(lying, upright.T)
    faint = edges(image[None] // 255 * 8)[0, 0]  # a step of 8: not scaled up
    assert faint.max() == 8


def test_edges_are_those_of_the_luminance():
    def step(left: tuple[int, ...], right: tuple[int, ...]) -> int:
        image = np.zeros((len(left), 3, 4), np.uint8)
        image[..., :2], image[..., 2:] = np.array(left)[:, None, None], np.array(right)[:, None, None]
        return int(edges(image[None])[0, 0, 1, 1])

    assert [step((0, 0, 0), pure) for pure in ((255, 0, 0), (0, 255, 0), (0, 0, 255))] == [76, 150, 29]  # BT.601
    assert step((255, 0, 0), (0, 130, 0)) == 0  # as bright as each other
    assert step((10, 10, 10), (60, 60, 60)) == step((10,), (60,)) == 50


@settings(max_examples=50)
@given(arrays(np.uint8, st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9))))
def test_edges_are_scipys_of_pillows_grey(images):
    found = edges(images)
    assert found.shape == (len(images), 1, *images.shape[2:])
    for image, edge in zip(images, found, strict=True):
        grey = image[0] if len(image) == 1 else np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L"))
        steep = [ndimage.sobel(grey.astype(float), axis, mode="nearest") for axis in (0, 1)]
        np.testing.assert_array_equal(edge[0], np.minimum(255, np.round(np.hypot(*steep) / 4)))


def test_an_images_edges_do_not_depend_on_what_it_is_computed_with(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 6, 5), dtype=np.uint8)
    together = edges(images)
    monkeypatch.setattr("cluster.data.sources.pixels.BLOCK_PIXELS", 210)  # seven images
    np.testing.assert_array_equal(edges(images), together)
    monkeypatch.setattr("cluster.data.sources.pixels.BLOCK_PIXELS", 1)
    np.testing.assert_array_equal(edges(images[::-1])[::-1], together)
