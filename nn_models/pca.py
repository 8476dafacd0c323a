"""Principal components: what an autoencoder of so many codes is compared with, from one look at the training rows.

Shapes: B rows of the batch, D numbers of a row, K components.
"""

import torch
from torch import Tensor, nn

from nn_models.batch import Batch
from nn_models.coding import Coded
from nn_models.objectives import Across

MOST_NUMBERS = 2000  # of a row: the covariance holds the square of this
NEAREST = 1e-6  # to 0 and 1 that a number comes whose logit is wanted


class PCA(nn.Module):
    """codes = P (x - m), rows again = m + P^T codes, P (K, D) with orthonormal rows (Pearson 1901; Hotelling 1933)."""

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor, *, logits: bool = False) -> None:
        """`logits`: give the logits of what is nearest to the rows again between 0 and 1."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.logits = logits

    def forward(self, x: Tensor, *, keep_codes: bool = False, contraction: bool = False) -> Tensor | Coded:
        """(B, *shape) -> the same shape; see CodingNet."""
        codes = (x.flatten(1) - self.mean) @ self.components.t()
        again = (self.mean + codes @ self.components).view_as(x)
        if self.logits:
            again = torch.logit(again.clamp(NEAREST, 1 - NEAREST))
        if not keep_codes and not contraction:
            return again
        return Coded(again, codes, codes.new_full((len(x),), float(codes.shape[1])))


class Copy(nn.Module):
    """Gives the rows again as they are."""

    def __init__(self, *, logits: bool = False) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor, *, keep_codes: bool = False, contraction: bool = False) -> Tensor | Coded:
        """(B, *shape) -> the same shape; see CodingNet."""
        again = torch.logit(x.clamp(NEAREST, 1 - NEAREST)) if self.logits else x
        return Coded(again, x.flatten(1), x.new_zeros(len(x))) if keep_codes or contraction else again


class PrincipalComponents:
    """The first K principal components of all training rows, from sums over them in float64: nothing is held.

    With `copies` also the rows as they are given: what a denoising net is to be better than. See Baseline.
    """

    def __init__(self, row_size: int, num_components: int, *, logits: bool = False, copies: bool = False) -> None:
        self._size, self._num = row_size, min(num_components, row_size)
        self._logits, self._copies = logits, copies
        self._sums: Tensor | None = None  # (1 + D, 1 + D) of products of (1, x) with itself

    def add(self, batch: Batch) -> None:
        """Take in a batch of training rows; not of rows that stand in."""
        rows = batch["input"].flatten(1).double()
        rows = torch.cat((torch.ones_like(rows[:, :1]), rows), 1)
        sums = rows.T @ rows
        self._sums = sums if self._sums is None else self._sums + sums

    def models(self, across: Across, device: torch.device) -> dict[str, nn.Module]:
        """By name, on the device. Called by all ranks; `across` sums a tensor on the device over them."""
        sums = self._sums
        if sums is None:  # a rank of more than there are rows
            sums = torch.zeros(1 + self._size, 1 + self._size, dtype=torch.float64, device=device)
        total = across(sums).cpu()
        mean = total[0, 1:] / total[0, 0]
        covariance = total[1:, 1:] / total[0, 0] - mean[:, None] * mean
        vectors = torch.linalg.eigh(covariance).eigenvectors  # by rising eigenvalues
        components = vectors.flip(1)[:, : self._num].T
        found: dict[str, nn.Module] = {"pca": PCA(mean.float(), components.float().contiguous(), logits=self._logits)}
        if self._copies:
            found["identity"] = Copy(logits=self._logits)
        return {name: model.to(device) for name, model in found.items()}
