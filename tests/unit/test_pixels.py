"""Images as a viewer shows them: upright, on white, of any depth; or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cluster.data.sources.pixels import decode_image
from nn_models.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")

RED, BLUE, WHITE = (250, 20, 20), (20, 20, 250), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes, channels: int = 3, **options) -> np.ndarray:
    """(height, width, channels)."""
    return decode_image(content, name="picture", channels=channels, size=options.get("size")).transpose(1, 2, 0)


def refusal(content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        decoded(content)
    return str(caught.value)


def scene() -> Image.Image:
    """32 wide, 16 high: red, but blue in the upper left, in blocks that JPEG keeps."""
    pixels = np.full((16, 32, 3), RED, np.uint8)
    pixels[:8, :8] = BLUE
    return Image.fromarray(pixels)


# how a camera stores the upright picture, by the orientation that undoes it (Exif 2.32, tag 0x0112)
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_upright(orientation, kind):
    tag, turn = Image.Exif(), STORED[orientation]
    tag[0x0112] = orientation
    stored = scene() if turn is None else scene().transpose(turn)
    found = decoded(encoded(stored, kind, exif=tag, **({"quality": 95} if kind in ("JPEG", "WEBP") else {})))
    assert found.shape == (16, 32, 3)
    # 20 of 255: JPEG and WebP round, most of all beside an edge
    np.testing.assert_allclose(found[2:6, 2:6].mean((0, 1)), BLUE, atol=20)
    np.testing.assert_allclose(found[10:, 10:].mean((0, 1)), RED, atol=20)


def test_the_size_is_that_of_the_upright_picture():
    tag = Image.Exif()
    tag[0x0112] = 6
    turned = encoded(scene().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=tag)
    assert decode_image(turned, name="picture", channels=3, size=(16, 32), size_field="data.image_size").shape[1] == 16


def half(mode: str) -> Image.Image:
    """Left half opaque red, right half transparent, with blue hidden below."""
    image = Image.new("RGBA", (4, 2), (*RED, 255))
    image.paste((*BLUE, 0), (2, 0, 4, 2))
    return image if mode == "RGBA" else image.convert(mode)


def palette(transparent: int | bytes) -> bytes:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (2, 0, 4, 2))
    return encoded(image, transparency=transparent)


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (encoded(half("RGBA")), RED),
        (encoded(half("RGBA"), "WEBP", lossless=True), RED),
        (encoded(half("LA")), (89, 89, 89)),  # 0.299 * 250 + 0.587 * 20 + 0.114 * 20
        (palette(1), RED),
        (palette(bytes([255, 0])), RED),
        (encoded(half("RGBA").convert("P"), "GIF", transparency=half("RGBA").convert("P").getpixel((3, 0))), None),
        (encoded(Image.fromarray(np.array([[RED, RED, BLUE, BLUE]] * 2, np.uint8)), transparency=BLUE), RED),
    ],
    ids=["RGBA", "WebP", "LA", "palette", "palette of alphas", "GIF", "RGB with a transparent colour"],
)
def test_what_is_transparent_lies_on_white(content, left):
    found = decoded(content)
    assert (found[:, 2:] == 255).all()
    if left:
        assert (found[:, :2] == left).all()
    assert (decoded(content, channels=1)[:, 2:] == 255).all()


def test_what_is_half_transparent_is_mixed_with_white():
    found = decoded(encoded(Image.new("RGBA", (2, 2), (0, 0, 200, 51))))  # a fifth
    np.testing.assert_allclose(found[0, 0], (204, 204, 244), atol=1)  # whole numbers


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("1", (3, 2), 1), "PNG"),
        (Image.new("1", (3, 2), 1), "TIFF"),
        (Image.new("L", (3, 2), 255), "PNG"),
        (Image.new("P", (3, 2), 5), "PNG"),
        (Image.new("CMYK", (3, 2), (0, 0, 0, 0)), "JPEG"),
        (Image.new("CMYK", (3, 2), (0, 0, 0, 0)), "TIFF"),
        (Image.new("YCbCr", (3, 2), (255, 128, 128)), "TIFF"),
        (Image.new("RGB", (3, 2), WHITE), "PPM"),
        (Image.new("RGB", (3, 2), WHITE), "BMP"),
        (Image.new("RGB", (3, 2), WHITE), "TGA"),
        (Image.new("RGB", (16, 16), WHITE), "ICO"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_any_depth_shows_white_as_white(image, kind):
    if image.mode == "P":
        image.putpalette([0, 0, 0] * 5 + [255, 255, 255])
    assert (decoded(encoded(image, kind)) == 255).all()
    assert (decoded(encoded(image, kind), channels=1) == 255).all()


def sixteen_bit_colour() -> bytes:
    """A PNG of one pixel of three 16-bit numbers, of which a viewer shows the upper bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


def test_colours_of_sixteen_bits_are_their_upper_bytes():
    assert decoded(sixteen_bit_colour())[0, 0].tolist() == [0x12, 0x80, 0xFF]


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(np.full((2, 3), 4000, np.uint16)), "PNG"),
        (Image.fromarray(np.full((2, 3), 4000, np.uint16)), "TIFF"),
        (Image.fromarray(np.full((2, 3), 4000, np.int32)), "TIFF"),
        (Image.fromarray(np.full((2, 3), 0.5, np.float32)), "TIFF"),
    ],
)
def test_grey_of_more_than_eight_bits_is_refused(image, kind):
    said = refusal(encoded(image, kind))
    assert said.startswith("picture: pixels of more than 8 bits (mode ")
    assert said.endswith("; convert the images to 8 bits")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(kind):
    frames = [Image.new("RGB", (4, 4), (0, 80 * number, 0)) for number in range(3)]
    said = refusal(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert said == f"picture: 3 pictures in one file ({kind}); save the one that counts"


def test_a_cameras_second_picture_is_not_another():
    content = encoded(scene(), "MPO", save_all=True, append_images=[scene().transpose(Image.Transpose.ROTATE_180)])
    np.testing.assert_allclose(decoded(content)[2:6, 2:6].mean((0, 1)), BLUE, atol=20)  # 20 of 255: JPEG rounds


def test_no_program_is_run_for_a_picture():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert refusal(postscript) == f"picture: {len(postscript)} bytes in no known image format; replace or remove it"


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF data
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_no_damage_to_an_orientation_is_a_traceback(kind):
    tag, generator = Image.Exif(), np.random.default_rng(0)
    tag[0x0112] = 6
    content = encoded(scene(), kind, exif=tag)
    place = content.index(b"Exif") if b"Exif" in content else len(content) - 60
    for _ in range(100):
        damaged = bytearray(content)
        damaged[(place + generator.integers(40)) % len(content)] = generator.integers(256)
        said = "picture: "
        try:
            decoded(bytes(damaged))
        except UserError as error:
            said = str(error)
        assert said.startswith("picture: ")
