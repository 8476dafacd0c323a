"""Denoising autoencoders: the net is given a row with noise, and gives the row without it again.

Shapes: B rows of the batch, D numbers of a row.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from nn_models.batch import Batch
from nn_models.coding import CodingSpec
from nn_models.columns import Scale
from nn_models.metrics import Metric
from nn_models.model import ModelSpec
from nn_models.noise import CORRUPTION, normal, uniform
from nn_models.objectives import Asked, Baseline
from nn_models.pca import MOST_NUMBERS, PrincipalComponents
from nn_models.reconstruction import LossName, RebuildingSpec, Reconstruction
from nn_models.signature import Signature
from nn_models.spec import invalid

Noise = Literal["gaussian", "masking", "salt_and_pepper"]
IDENTITY = (
    Metric("identity_mse", "less", words="squared error a number of the noisy row"),
    Metric("identity_auroc", "more", words="AUROC of the noise itself"),
    Metric("identity_average_precision", "more", words="average precision of the noise itself"),
)


def corrupted(rows: Tensor, keys: Tensor, noise: Noise, level: float) -> Tensor:
    """Rows (B, *shape) with noise from their keys (B,): the same of a row on any rank, in any batch.

    gaussian: x + level n, n standard normal; masking: each number is 0 with probability `level`; salt and pepper: it is
    0 or 1, either with probability level / 2 (Vincent et al. 2010, section 3.1).
    """
    return _mixed(rows, _drawn(rows, keys, noise), noise, level)


def _drawn(rows: Tensor, keys: Tensor, noise: Noise) -> Tensor:
    """(B, *shape): numbers of each row's own."""
    draw = normal if noise == "gaussian" else uniform
    return draw(keys, rows.shape[1:], stream=CORRUPTION).to(rows.dtype)


def _mixed(rows: Tensor, drawn: Tensor, noise: Noise, level: float | Tensor) -> Tensor:
    if noise == "gaussian":
        return rows + level * drawn
    if noise == "masking":
        return rows * (drawn >= level)
    return torch.where(drawn < level, (drawn < level / 2).to(rows.dtype), rows)


class Denoising(Reconstruction):
    """Reconstruction of x from a noisy x~ (Vincent et al. 2008, 2010); the errors are those against x.

    The noise is drawn anew in each epoch, and is the same in each test. An opened model is given rows as they are.
    """

    def __init__(self, *, loss: LossName, noise: Noise, level: float) -> None:
        super().__init__(loss=loss)
        self.noise, self.level = noise, level

    def given(self, batch: Batch) -> Tensor:
        """See Reconstruction."""
        return corrupted(batch["input"], batch.keys, self.noise, self.level)

    def asks(self, batch: Batch, *, shared: bool, each: Mapping[str, Tensor]) -> Asked:
        """See Objective: the same noise for all trials, which may be differently strong."""
        assert shared  # trials of several seeds are not fused: see ObjectiveSpec.draws
        if "level" not in each:
            return Asked(self.given(batch), True, options=self.options)
        rows = batch["input"]
        levels = each["level"].view(1, -1, *[1] * (rows.dim() - 1))
        drawn = _drawn(rows, batch.keys, self.noise)
        return Asked(_mixed(rows[:, None], drawn[:, None], self.noise, levels), False, options=self.options)

    def baseline(self, signature: Signature, model: ModelSpec) -> Baseline | None:
        """See Objective: PCA of the rows without noise, and the noisy row itself."""
        if not isinstance(model, CodingSpec) or signature.input_size > MOST_NUMBERS:
            return None
        return PrincipalComponents(signature.input_size, model.code, logits=self.loss == "bce", copies=True)


class DenoisingSpec(RebuildingSpec):
    """Give each row again from what noise has left of it."""

    objective = Denoising
    draws = True
    baselines = (*RebuildingSpec.baselines, *IDENTITY)
    kind: Literal["denoising"] = "denoising"
    noise: Noise = Field("gaussian", description="added numbers, zeros, or zeros and ones (pixels only)")
    level: PositiveFloat = Field(
        0.3,
        description="gaussian: standard deviation, at the scale of the net; else the share of changed numbers",
    )

    @property
    def scale(self) -> Scale:
        """See ObjectiveSpec: salt and pepper are the ends of numbers from 0 to 1."""
        return "bounded" if self.noise == "salt_and_pepper" else super().scale

    @model_validator(mode="after")
    def _a_share(self) -> Self:
        if self.noise != "gaussian" and self.level > 1:
            raise invalid(f"{self.noise} changes a share, so at most 1, not {self.level}", field="level")
        return self

    def build(self, signature: Signature) -> Denoising:
        """The objective."""
        return Denoising(loss=self.loss, noise=self.noise, level=self.level)
