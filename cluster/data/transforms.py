"""Transforms: what each kind of augmentation draws for the rows of a batch, and how it is applied to whole batches.

Drawing and applying are apart, so that given parameters can be compared with torchvision's functions of the same name.
Every step is computed element by element, or with sums of integers: a row becomes the same in any batch. Nothing is
read back from the device.

Shapes: images (B, C, H, W) uint8; a parameter is a tensor (B,) on their device.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = Mapping[str, Tensor]

TRIES = 10  # rectangles that torchvision draws before it gives up
CROP_RATIO = (3 / 4, 4 / 3)  # width to height of a resized crop
ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)  # height to width


class Transform(ABC):
    """A random change of images. `draw` makes parameters, each named as torchvision names it; `apply` uses them."""

    numbers: ClassVar[int]  # uniform numbers that a row's draw takes
    floats: ClassVar[bool] = False  # whether pixels become floats in between

    @abstractmethod
    def draw(self, uniforms: Tensor) -> Parameters:
        """The parameters of each row from `uniforms` (B, numbers) in [0, 1)."""

    @abstractmethod
    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Changed copies of the images, of the same shape."""


class HorizontalFlip(Transform):
    """Mirror left and right with probability `p`."""

    numbers = 1

    def __init__(self, p: float) -> None:
        self._p = p

    def draw(self, uniforms: Tensor) -> Parameters:
        """`flip`: whether to."""
        return {"flip": uniforms[:, 0] < self._p}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See Transform. Pixels are whole: the result is torchvision's."""
        # on bytes, this is five times as fast as torch.where with a condition for each row
        chosen = parameters["flip"].to(torch.uint8).mul(255)[:, None, None, None]
        return (images ^ images.flip(-1)).bitwise_and_(chosen).bitwise_xor_(images)


class RandomCrop(Transform):
    """Pad by `padding` pixels of zeros on each side, then cut out the original size anywhere."""

    numbers = 2

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def draw(self, uniforms: Tensor) -> Parameters:
        """`top`, `left`: first row and column in the padded image, from 0 to twice the padding."""
        top, left = _below(uniforms, 2 * self._padding + 1).unbind(1)
        return {"top": top, "left": left}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See Transform. Pixels are whole: the result is torchvision's."""
        B, C, H, W = images.shape
        padded = F.pad(images.contiguous(), (self._padding,) * 4)
        height, width = padded.shape[2:]
        # A row of pixels is W bytes in succession from somewhere on: copied as a whole, they cost an eighth of a gather
        # of pixels. `starts` (B, C, H) says where, in the flat bytes of the padded batch.
        rows = torch.arange(H, device=images.device)
        planes = torch.arange(B * C, device=images.device).view(B, C, 1) * (height * width)
        corners = parameters["top"] * width + parameters["left"]
        starts = planes + corners[:, None, None] + rows * width
        return padded.view(-1).unfold(0, W, 1).index_select(0, starts.view(-1)).view(B, C, H, W)


class Rotation(Transform):
    """Rotate about the middle by up to `degrees` either way; each pixel is the nearest one, or 0 outside."""

    numbers = 1
    floats = True

    def __init__(self, degrees: float) -> None:
        self._degrees = degrees

    def draw(self, uniforms: Tensor) -> Parameters:
        """`angle`: degrees, anticlockwise."""
        return {"angle": _between(uniforms[:, 0], -self._degrees, self._degrees)}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See Transform. Rounds as torchvision does, in the same order of steps: the result is its."""
        H, W = images.shape[2:]
        radians = torch.deg2rad(parameters["angle"].double())[:, None]
        cos, sin = radians.cos().float(), radians.sin().float()
        x, y = _centred(W, images.device), _centred(H, images.device)[:, None]
        # columns x cos - y sin, rows x sin + y cos: the share of x, and the factor of y
        across = _alternating(x * (cos / (0.5 * W)), x * (sin / (0.5 * H)))
        down = _alternating((-sin / (0.5 * W)).expand(-1, W), (cos / (0.5 * H)).expand(-1, W))
        return _bytes(_sampled(images, across, down, y, mode="nearest"))


class ResizedCrop(Transform):
    """Cut out a rectangle of at least `min_area` of the image and enlarge it to the original size."""

    numbers = 2 * TRIES + 2
    floats = True

    def __init__(self, shape: tuple[int, ...], min_area: float) -> None:
        self._height, self._width = shape[1:]
        self._min_area = min_area

    def draw(self, uniforms: Tensor) -> Parameters:
        """`top`, `left`, `height`, `width`: the rectangle, in pixels; in the middle where no try has fitted."""
        H, W = self._height, self._width
        tried = _rectangles(uniforms, H * W, (self._min_area, 1.0), CROP_RATIO)
        width, height = tried  # the ratio is width to height
        fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
        some = fits.any(1)
        middle_height = min(H, round(W / CROP_RATIO[0]))
        middle_width = min(W, round(H * CROP_RATIO[1]))
        height = torch.where(some, _first(height, fits), middle_height)
        width = torch.where(some, _first(width, fits), middle_width)
        spare = torch.stack((H - height, W - width), 1)
        anywhere = _below(uniforms[:, 2 * TRIES :], spare + 1)
        top, left = torch.where(some[:, None], anywhere, spare // 2).unbind(1)
        return {"top": top, "left": left, "height": height, "width": width}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See Transform. What is never made smaller needs no antialiasing: bilinear, from the rectangle alone."""
        rows = _enlarged(images.shape[2], parameters["top"], parameters["height"])[:, :, None]
        columns = _enlarged(images.shape[3], parameters["left"], parameters["width"])
        zeros = torch.zeros_like(columns)
        across, down = _alternating(columns, zeros), _alternating(zeros, zeros + 1)
        return _bytes(_sampled(images, across, down, rows, mode="bilinear").round_())


class ColorJitter(Transform):
    """Change brightness, contrast and saturation by up to these shares, in random order."""

    numbers = 4
    floats = True

    def __init__(self, brightness: float, contrast: float, saturation: float) -> None:
        self._shares = (brightness, contrast, saturation)

    def draw(self, uniforms: Tensor) -> Parameters:
        """`brightness`, `contrast`, `saturation`: factors; `order`: which of the six orders, see `apply`."""
        brightness, contrast, saturation = (
            _between(numbers, max(0.0, 1 - share), 1 + share)
            for numbers, share in zip(uniforms[:, :3].unbind(1), self._shares, strict=True)
        )
        order = _below(uniforms[:, 3], 6)
        return {"brightness": brightness, "contrast": contrast, "saturation": saturation, "order": order}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See Transform. `order` // 2 comes first; of the other two, the next of the circle where `order` is even."""
        order = parameters["order"]
        factors = torch.stack([parameters[name] for name in ("brightness", "contrast", "saturation")], 1)
        first, turn = order // 2, order % 2
        pixels = images.to(torch.float32)
        # Sums of whole numbers are exact, so that no batch adds them up otherwise: below 2**24 in float32.
        exact = torch.float32 if 255 * images.shape[2:].numel() < 2**24 else torch.float64
        for change in (first, (first + 1 + turn) % 3, (first + 2 - turn) % 3):
            contrast, saturation = (change == 1)[:, None, None, None], (change == 2)[:, None, None, None]
            factor = factors.gather(1, change[:, None])[:, :, None, None]
            if images.shape[1] == 1:
                light = pixels
                factor = factor.masked_fill(saturation, 1.0)  # a grey image has none
            else:
                light = _grey(pixels)
            # All three move pixels away from or towards something: black, the mean grey, each pixel's own grey.
            mean = light.sum((1, 2, 3), keepdim=True, dtype=exact).div(light.shape[1:].numel()).float()
            towards = (light * saturation).add_(mean * contrast)
            pixels.mul_(factor).addcmul_(towards, 1 - factor).clamp_(0, 255).floor_()
        return _bytes(pixels)


class Erasing(Transform):
    """Blank a random rectangle with probability `p` (Zhong et al. 2017)."""

    numbers = 2 * TRIES + 3

    def __init__(self, shape: tuple[int, ...], p: float) -> None:
        self._height, self._width = shape[1:]
        self._p = p

    def draw(self, uniforms: Tensor) -> Parameters:
        """`top`, `left`, `height`, `width`: the rectangle, in pixels; without extent where nothing is blanked."""
        H, W = self._height, self._width
        height, width = _rectangles(uniforms, H * W, ERASED_AREA, ERASED_RATIO)  # the ratio is height to width
        fits = (height < H) & (width < W)
        wanted = fits.any(1) & (uniforms[:, -1] < self._p)
        height, width = _first(height, fits) * wanted, _first(width, fits) * wanted
        spare = torch.stack((H - height, W - width), 1)
        top, left = _below(uniforms[:, 2 * TRIES : -1], spare + 1).unbind(1)
        return {"top": top, "left": left, "height": height, "width": width}

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """See Transform. Pixels are whole: the result is torchvision's."""
        rows = _within(images.shape[2], parameters["top"], parameters["height"])[:, :, None]
        columns = _within(images.shape[3], parameters["left"], parameters["width"])[:, None, :]
        kept = (rows & columns).bitwise_not_()
        return images & kept[:, None]


def _between(uniforms: Tensor, low: float, high: float) -> Tensor:
    """Numbers in [low, high] from those in [0, 1)."""
    return uniforms * (high - low) + low


def _below(uniforms: Tensor, bound: Tensor | int) -> Tensor:
    """Integers (int64) from 0 to below `bound`, from multiples of 2**-24 in [0, 1).

    Whole numbers all the way: a product of floats could round up to `bound`. No outcome is likelier than another by
    more than `bound` in 2**24.
    """
    return (uniforms * 2.0**24).long().mul(bound) >> 24


def _rectangles(
    uniforms: Tensor, pixels: int, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The sides (B, TRIES) of rectangles in whole pixels, of uniform share of the area and uniform log of the ratio.

    The first is the ratio times the second.
    """
    areas = pixels * _between(uniforms[:, :TRIES], *area)
    ratios = _between(uniforms[:, TRIES : 2 * TRIES], math.log(ratio[0]), math.log(ratio[1])).exp()
    return (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()


def _first(sides: Tensor, fits: Tensor) -> Tensor:
    """(B,) of the first try that fits; of the first one where none does."""
    return sides.gather(1, fits.int().argmax(1, keepdim=True))[:, 0]


def _centred(size: int, device: torch.device) -> Tensor:
    """(size,) float32 places of pixels, from the middle."""
    return torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, size, device=device)


def _enlarged(size: int, start: Tensor, length: Tensor) -> Tensor:
    """(B, size): where the pixels lie that are made of `length` ones from `start` on; -1 to 1 from edge to edge.

    None lies outside the middles of the first and the last of these: nothing else of the image comes in.
    """
    start, length = start[:, None].float(), length[:, None].float()
    pixels = torch.arange(size, device=start.device)
    within = ((pixels + 0.5) * (length / size) - 0.5).clamp_(min=0).minimum(length - 1)
    return (within + start).mul_(2).add_(1).div_(size).sub_(1)


def _alternating(columns: Tensor, rows: Tensor) -> Tensor:
    """(B, 2 W) of two (B, W): column, row, column, row, … as F.grid_sample wants places."""
    return torch.stack((columns, rows), -1).flatten(1)


def _sampled(images: Tensor, across: Tensor, down: Tensor, y: Tensor, *, mode: str) -> Tensor:
    """float32 images at the places `across` + `down` y, from -1 to 1 from edge to edge; beyond, all is 0.

    `across` and `down` (B, 2 W) are `_alternating`, y is (H, 1) or (B, H, 1): stacking the columns and the rows of all
    pixels instead would take longer than all the rest.
    """
    grid = (y * down[:, None]).add_(across[:, None]).unflatten(-1, (-1, 2))
    return F.grid_sample(images.float(), grid, mode=mode, padding_mode="zeros", align_corners=False)


def _bytes(pixels: Tensor) -> Tensor:
    """Whole numbers as uint8. Straight from float32, it would take three times as long."""
    return pixels.to(torch.int16).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """(B, 1, H, W) whole numbers: how bright red, green and blue appear (ITU-R 601-2)."""
    red, green, blue = pixels.split(1, 1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _within(size: int, start: Tensor, length: Tensor) -> Tensor:
    """(B, size) uint8: 255 for `length` pixels from `start` on, 0 for others."""
    pixels = torch.arange(size, device=start.device)
    inside = (pixels >= start[:, None]) & (pixels < (start + length)[:, None])
    return inside.to(torch.uint8).mul_(255)
