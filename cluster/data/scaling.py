"""Scaling: stored numbers as models read them, at the scale that a model or an objective asks for, and back."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cluster.data.manifest import StoredColumn
from nn_models.batch import Ragged, Value
from nn_models.columns import Scale
from nn_models.errors import UserError

BYTE_MIDDLE = 127.5  # of 0 to 255


class Scaling:
    """Applied to all columns of a batch by their names; columns that hold no numbers to scale stay as they are."""

    def __init__(self, columns: Mapping[str, StoredColumn], scale: Scale, device: torch.device) -> None:
        """Raises UserError where a column cannot be had at this scale."""
        found = {
            name: _scaling(stored, scale, device, name=name) for name, stored in columns.items() if stored.column.scaled
        }
        self._columns = {name: column for name, column in found.items() if column is not None}

    def __call__(self, stored: Mapping[str, Value]) -> dict[str, Value]:
        """Float32 of the same shapes."""
        ready = dict(stored)
        for name, scaling in self._columns.items():
            if name in ready:
                ready[name] = _applied(scaling, ready[name])
        return ready

    def inverse(self, name: str, values: Tensor) -> Tensor:
        """Numbers at this scale as they are stored, in float32 and not rounded."""
        return self._columns[name].inverse(values) if name in self._columns else values


def _applied(scaling: "_Affine | _Symmetric", value: Value) -> Value:
    if isinstance(value, Ragged):
        return replace(value, values=scaling(value.values))
    assert isinstance(value, Tensor)  # trees hold no numbers
    return scaling(value)


class _Affine:
    """(x - mean) / std, where a stored number counts 1 / unit."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], unit: float, dims: int, device: torch.device
    ) -> None:
        """`dims` is how many dimensions of a row follow the one that the moments belong to."""
        means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        scale, shift = 1 / (stds * unit), -means / stds
        shape = (-1, *[1] * dims)
        self._scale = scale.float().reshape(shape).to(device)
        # one number for all inputs needs no broadcast, and then one pass over them does
        self._only_scale = float(scale) if len(scale) == 1 else None
        self._shift = shift.float().reshape(() if len(shift) == 1 else shape).to(device)

    def __call__(self, stored: Tensor) -> Tensor:
        if self._only_scale is not None:
            return torch.add(self._shift, stored, alpha=self._only_scale)
        return torch.mul(stored, self._scale).add_(self._shift)

    def inverse(self, values: Tensor) -> Tensor:
        return (values - self._shift) / self._scale


class _Symmetric:
    """Bytes as -1 to 1, for images without moments."""

    def __call__(self, stored: Tensor) -> Tensor:
        return torch.div(stored, BYTE_MIDDLE).sub_(1)

    def inverse(self, values: Tensor) -> Tensor:
        return (values + 1) * BYTE_MIDDLE


def _scaling(stored: StoredColumn, scale: Scale, device: torch.device, *, name: str) -> _Affine | _Symmetric | None:
    image = len(stored.column.row_shape) == 3
    dims = 2 if image else 0
    if stored.column.predicted:  # whatever the model reads; not by the manifests of earlier versions
        return _Affine(stored.mean, stored.std, stored.unit, dims, device) if stored.mean else None
    if scale == "bounded" and stored.dtype != "uint8":
        raise UserError(
            "data",
            f"its {name} has {stored.dtype} numbers, which may lie outside 0 to 1, where the objective or the model "
            "reads bytes as 0 to 1",
            "choose a loss, or a decoder, of any numbers, or data of bytes such as pixels",
        )
    if scale in ("unit", "bounded") or (scale == "pixels" and stored.dtype == "uint8"):
        return _Affine((0.0,), (1.0,), stored.unit, dims, device) if stored.unit != 1 else None
    if scale == "symmetric" and image:
        if not stored.moments and stored.dtype == "uint8":
            return _Symmetric()
        half = (0.5,) * stored.num_moments
        return _Affine(half, half, stored.unit, dims, device)
    if not stored.moments:
        raise UserError(
            "data",
            f"no mean and deviation of its {name} are kept, which {scale} inputs need",
            "choose a model that reads it from -1 to 1",
        )
    return _Affine(stored.mean, stored.std, stored.unit, dims, device)
