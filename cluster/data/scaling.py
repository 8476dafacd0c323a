"""Scaling: what is stored as what models read."""

import torch
from torch import Tensor

from cluster.data.manifest import Manifest


class Normalise:
    """Stored inputs to what models read: (x / 255 - mean) / std for images, (x - mean) / std otherwise."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        mean, std = torch.tensor(manifest.mean, dtype=torch.float64), torch.tensor(manifest.std, dtype=torch.float64)
        scale, shift = 1 / (std * (255.0 if manifest.input_dtype == "uint8" else 1.0)), -mean / std
        shape: tuple[int, ...] = (-1, 1, 1) if len(manifest.input_shape) == 3 else (-1,)
        self._scale = scale.float().reshape(shape).to(device)
        # one number for all inputs needs no broadcast, and then one pass over them does
        self._only_scale = float(scale) if len(scale) == 1 else None
        self._shift = shift.float().reshape(() if len(shift) == 1 else shape).to(device)

    def __call__(self, stored: Tensor) -> Tensor:
        """Float32 of the same shape."""
        if self._only_scale is not None:
            return torch.add(self._shift, stored, alpha=self._only_scale)
        return torch.mul(stored, self._scale).add_(self._shift)


def symmetric(stored: Tensor) -> Tensor:
    """Bytes of images as float32 in [-1, 1], as adversarial nets read them."""
    return torch.div(stored, 127.5).sub_(1)
