"""Figures: metrics of a whole split that are no means over its rows, exact over all ranks.

Shapes: N rows of the split, C classes, K predicted numbers.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nn_models.batch import Batch
from nn_models.metrics import Metric

TOP = 5  # of top-5 accuracy
TOP_FROM_CLASSES = 11  # where it is shown unasked: five of ten classes are half of them
MAX_SCORES = 1 << 25  # numbers (256 MiB) that AUROC may gather unasked

CLASS_FIGURES = (
    Metric("balanced_accuracy", "more"),
    Metric("macro_f1", "more", words="macro F1"),
    Metric("auroc", "more", words="AUROC"),
    Metric("top5_accuracy", "more", words="top-5 accuracy"),
)
NUMBER_FIGURES = (Metric("r2", "more", words="R\u00b2"),)


class Figures(Protocol):
    """Takes in the batches of a split, on each rank its own, and says what comes of all of them together."""

    def add(self, batch: Batch, outputs: Any) -> None:
        """Take in one batch and what the objective's `Measured.outputs` were; not of rows that stand in."""

    def values(self, across: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """By name. Called by all ranks; `across` sums a tensor on the device over them."""


class ClassFigures:
    """Of predicted classes.

    With the rows that are of class c (n_c), that are taken for it (m_c), and both (r_c):

        balanced accuracy = mean_c r_c / n_c                     over classes that have rows (Brodersen et al. 2010)
        macro F1 = mean_c 2 r_c / (n_c + m_c)                    over classes that rows have or are taken for
        AUROC = mean_c P(p_c(row of c) > p_c(another row))       ties count half; c against the rest
        top-5 accuracy                                           rows whose class is one of the five likeliest
    """

    def __init__(self, num_classes: int, names: Collection[str]) -> None:
        """`names` are those of CLASS_FIGURES that are wanted."""
        self._num_classes, self._names = num_classes, names
        self._counts: Tensor | None = None  # (3, C) int64: n, m, r
        self._top: Tensor | None = None
        self._scores = Gathered()

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """See Figures: outputs (B, C)."""
        targets = batch["target"]
        predictions = outputs.max(1).indices
        counts = targets.new_zeros(3, self._num_classes)
        ones = torch.ones_like(targets)
        counts[0].scatter_add_(0, targets, ones)
        counts[1].scatter_add_(0, predictions, ones)
        counts[2].scatter_add_(0, targets, (predictions == targets).long())
        self._counts = counts if self._counts is None else self._counts + counts
        if "top5_accuracy" in self._names:
            best = outputs.topk(min(TOP, self._num_classes), 1).indices
            found = (best == targets[:, None]).sum()
            self._top = found if self._top is None else self._top + found
        if "auroc" in self._names:
            self._scores.add(batch, torch.cat((targets[:, None].double(), outputs.double().softmax(1)), 1))

    def values(self, across: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """See Figures."""
        counts = self._counts
        if counts is None:  # a rank of more than there are rows
            counts = torch.zeros(3, self._num_classes, dtype=torch.int64, device=device)
        top = torch.zeros((), dtype=torch.int64, device=device) if self._top is None else self._top
        total = across(torch.cat((counts.flatten(), top.reshape(1))))
        true, predicted, right = total[:-1].view(3, -1).double()
        found = {
            "balanced_accuracy": float((right / true)[true > 0].mean()),
            "macro_f1": float((2 * right / (true + predicted))[true + predicted > 0].mean()),
            "top5_accuracy": float(total[-1] / true.sum()),
        }
        if "auroc" in self._names:
            rows = self._scores.whole(across, device, width=1 + self._num_classes)
            found["auroc"] = auroc(rows[:, 1:], rows[:, 0])
        return {metric.name: found[metric.name] for metric in CLASS_FIGURES if metric.name in self._names}


class NumberFigures:
    """Of predicted numbers: R2 = 1 - sum (y - f)^2 / sum (y - mean y)^2 over the split, the mean of K outputs'."""

    def __init__(self) -> None:
        self._rows = Gathered()

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """See Figures: outputs (B, K). At any scale: R2 does not depend on it."""
        outputs = outputs.double()
        self._rows.add(batch, torch.cat((batch["target"].reshape(outputs.shape).double(), outputs), 1))

    def values(self, across: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """See Figures. As scikit-learn has it, 0 or 1 where all rows have the same number."""
        targets, predictions = self._rows.whole(across, device).chunk(2, 1)
        squares = (targets - targets.mean(0)).square().sum(0)
        errors = (targets - predictions).square().sum(0)
        each = torch.where(squares > 0, 1 - errors / squares, (errors == 0).double())
        return {"r2": float(each.mean())}


class Several:
    """Figures that come of the same batches."""

    def __init__(self, figures: Sequence[Figures]) -> None:
        self._figures = figures

    def add(self, batch: Batch, outputs: Any) -> None:
        """See Figures."""
        for figures in self._figures:
            figures.add(batch, outputs)

    def values(self, across: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """See Figures."""
        return {name: value for figures in self._figures for name, value in figures.values(across, device).items()}


class Gathered:
    """Rows of numbers from all ranks, in the order of the split."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._places: list[Tensor] = []  # in the split

    def add(self, batch: Batch, values: Tensor) -> None:
        """Take in what there is of a batch's rows (B, width), in float64."""
        self._values.append(values)
        self._places.append(torch.from_numpy(batch.place.ids))

    def whole(self, across: Callable[[Tensor], Tensor], device: torch.device, *, width: int | None = None) -> Tensor:
        """(N, width) on all ranks: each row comes from one of them, and the others add nothing to its place."""
        own = self._values[0].shape[1] if self._values else 0
        sizes = torch.tensor([sum(map(len, self._values)), own], device=device)
        found = across(torch.cat((sizes, (sizes > 0).long())))
        num_rows, total_width, _, num_ranks = found.tolist()
        width = width or total_width // max(num_ranks, 1)
        rows = torch.zeros(num_rows, width, dtype=torch.float64, device=device)
        for place, values in zip(self._places, self._values, strict=True):
            rows[place.to(device)] = values
        return across(rows)


def auroc(scores: Tensor, targets: Tensor) -> float:
    """The mean over classes c of the area under the curve of c against the rest, from scores (N, C) and classes (N,).

    By the ranks of the rows (Mann & Whitney 1947), equal scores at their middle. Classes of all rows or of none have
    no such area; NaN where there is no other. (To import scikit-learn takes as long as to train on digits.)
    """
    areas = []
    for number in range(scores.shape[1]):
        positive = targets == number
        num = int(positive.sum())
        if not 0 < num < len(targets):
            continue
        _, place, counts = scores[:, number].unique(return_inverse=True, return_counts=True)
        ranks = counts.cumsum(0) - (counts - 1) / 2
        above = float(ranks[place][positive].double().sum()) - num * (num + 1) / 2
        areas.append(above / (num * (len(targets) - num)))
    return sum(areas) / len(areas) if areas else math.nan
