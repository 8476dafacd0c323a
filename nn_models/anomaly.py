"""Anomalies: rows of classes that training never had, told from the others by how far off an autoencoder gives them.

Shapes: N rows of a split, B rows of a batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nn_models.batch import Batch
from nn_models.figures import Figures, Gathered, auroc
from nn_models.metrics import Metric, Reported
from nn_models.signature import Signature

RATE = 0.05  # of the normal rows that a run's own threshold takes for anomalies
CONFIDENCE = 0.95  # of intervals

AUROC = Metric("auroc", "more", words="AUROC")
AVERAGE_PRECISION = Metric("average_precision", "more", words="average precision")
NORMAL_ERROR = Metric("normal_error", "less", words="threshold: squared error of 95 % of the rows")
FOUND = (AUROC, AVERAGE_PRECISION)  # of a test
PCA_FOUND = (
    Metric("pca_auroc", "more", words="AUROC of PCA's error"),
    Metric("pca_average_precision", "more", words="average precision of PCA's error"),
)


def novel(signature: Signature) -> tuple[int, ...]:
    """The classes that have rows, but none to train on; where their numbers are known."""
    counts = getattr(signature.columns.get("target"), "counts", {})
    train = counts.get("train", ())
    return tuple(number for number, rows in enumerate(train) if not rows and any(of[number] for of in counts.values()))


def threshold(errors: Tensor, rate: float) -> float | None:
    """The error above which a row is taken for an anomaly, from those of n normal rows (n,) that were not trained on.

    It is the j-th smallest, j = ceil((1 - rate) (n + 1)): of normal rows that are drawn like these, on average
    (n + 1 - j) / (n + 1), at most `rate`, lie above it, however errors are distributed (Vovk, Gammerman & Shafer
    2005, conformal prediction). None where n rows are too few for such a rate.
    """
    place = max(1, math.ceil(round((1 - rate) * (len(errors) + 1), 9)))
    return float(errors.sort().values[place - 1]) if place <= len(errors) else None


def false_positives(num_normal: int, *, above: int, validation: int) -> tuple[int, int]:
    """How many of so many normal rows lie above a threshold that `above` of `validation` ones lie above: an interval.

    Their number has a beta-binomial distribution with a = above + 1, b = validation - above, the threshold being one of
    these rows (Guenther 1969: distribution-free prediction intervals); the interval holds at least CONFIDENCE of it.
    """
    k = torch.arange(num_normal + 1, dtype=torch.float64)
    a, b, n = float(above + 1), float(max(validation - above, 1)), float(num_normal)
    log = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log = log + torch.lgamma(k + a) + torch.lgamma(n - k + b) - math.lgamma(n + a + b)
    log = log + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    below, tail = log.exp().cumsum(0), (1 - CONFIDENCE) / 2
    low, high = (int((below < share).sum()) for share in (tail, 1 - tail))
    return low, min(high, num_normal)


def share_between(count: int, of: int) -> tuple[float, float]:
    """The interval of a share of which `count` of so many were counted (Wilson 1927), of CONFIDENCE."""
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(CONFIDENCE, dtype=torch.float64)))
    share, shrunk = count / of, 1 + z**2 / of
    middle = (share + z**2 / (2 * of)) / shrunk
    half = z / shrunk * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """sum_n (R_n - R_(n-1)) P_n over the distinct scores (N,) from the highest on: precision by recall.

    NaN where no row is positive. (As scikit-learn has it; to import that takes as long as to train on digits.)
    """
    values, place = scores.unique(return_inverse=True)  # rising
    hits = torch.zeros(len(values), dtype=torch.float64).index_add(0, place, positive.double())
    taken = torch.zeros(len(values), dtype=torch.float64).index_add(0, place, torch.ones_like(scores).double())
    hits, taken = hits.flip(0), taken.flip(0)
    total = float(hits.sum())
    return float((hits / total * hits.cumsum(0) / taken.cumsum(0)).sum()) if total else math.nan


def separation(errors: Tensor, anomalous: Tensor) -> dict[str, float]:
    """AUROC and average precision of errors (N,) as scores of being anomalous (N,) bool; none of only one sort."""
    if not 0 < int(anomalous.sum()) < len(anomalous):
        return {}
    area = auroc(torch.stack((-errors, errors), 1), anomalous.long())  # both columns have the same area
    return {AUROC.name: area, AVERAGE_PRECISION.name: average_precision(errors, anomalous)}


class AnomalyFigures:
    """How well the squared error a number tells rows of other classes than those trained on; the threshold by it.

    Of a test FOUND, of validation, where rows are normal, NORMAL_ERROR: the threshold of RATE.
    """

    def __init__(self, classes: Sequence[int], *, tested: bool) -> None:
        self._classes, self._tested = torch.tensor(classes), tested
        self._rows = Gathered()

    def add(self, batch: Batch, outputs: Any) -> None:
        """See Figures: outputs with `again` (B, *shape)."""
        errors = (outputs.again - batch["input"]).square().flatten(1).mean(1).double()
        anomalous = torch.isin(batch["target"], self._classes.to(errors.device))
        self._rows.add(batch, torch.stack((errors, anomalous.double()), 1))

    def values(self, across: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """See Figures."""
        errors, anomalous = self._rows.whole(across, device, width=2).cpu().unbind(1)
        if self._tested:
            return separation(errors, anomalous > 0)
        normal = errors[anomalous == 0]
        if not len(normal):
            return {}
        found = threshold(normal, RATE)
        return {NORMAL_ERROR.name: float(normal.max()) if found is None else found}


def anomaly_figures(signature: Signature, num_rows: int | None) -> list[Figures]:
    """Those of data with classes that are not trained on; `num_rows` is that of a test. See Objective.figures."""
    classes = novel(signature)
    return [AnomalyFigures(classes, tested=num_rows is not None)] if classes else []


def with_threshold(reported: Reported, signature: Signature | None) -> Reported:
    """What is reported, and the threshold of each validation where such data has classes that are not trained on."""
    if signature is None or not novel(signature):
        return reported
    return reported._replace(validation=(*reported.validation, NORMAL_ERROR))
