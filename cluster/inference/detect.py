"""detect: which rows are anomalies, by how far off a run's autoencoder gives them again; from RUN/model alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cluster.data.sources.base import UNLABELLED, DataSpec
from cluster.inference.encode import opened_coder
from cluster.inference.rows import Piece, RowsUsed, rows_of, told, which
from cluster.runs.coder import Coder
from nn_models.anomaly import CONFIDENCE, RATE, false_positives, separation, share_between, threshold
from nn_models.columns import Label
from nn_models.errors import UserError, did_you_mean

MOST_NAMES = 1000  # of labels that no class is known of: more are no classes


@dataclass(frozen=True)
class Threshold:
    """The squared error a number above which a row is taken for an anomaly.

    `rate` is the share of normal rows that it takes for such at most, on average; `rows` how many of validation it was
    chosen by, of which `above` lie above it. Both are 0 where the user gave it, and the rate None.
    """

    value: float
    rate: float | None = None
    rows: int = 0
    above: int = 0


class Detector:
    """A run's autoencoder, its threshold, and what is to be taken for an anomaly where rows have labels."""

    def __init__(
        self,
        run: str,
        *,
        anomaly: Sequence[str] = (),
        rate: float | None = None,
        given: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`anomaly` are names of classes: by default those that the run's data says, or that training had no row of.

        The threshold is `given`, or chosen so that at most the share `rate` (RATE) of normal rows lies above it: by
        the run's own validation rows. Raises UserError where there are none, or too few for such a rate.
        """
        self.model: Coder = opened_coder(run, device=device)
        self._asked = tuple(anomaly)
        self._anomaly = self._asked or tuple(getattr(self.model.recipe.data, "anomaly", ()))
        self._known = _trained_on(self.model)
        self.threshold = Threshold(given) if given is not None else self._chosen(RATE if rate is None else rate)

    def _chosen(self, rate: float) -> Threshold:
        source = self.model.recipe.data.kind
        try:
            used = rows_of(self.model, None, splits=("validation",))
        except UserError as error:
            if error.path != "--split":
                raise
            raise UserError(
                "--threshold", f"{source} has no validation rows to choose one by", "give one, a squared error a number"
            ) from None
        parts, rows = [np.empty(0, np.float32)], 0
        for piece in used.pieces:
            truth, found = self._truth(piece), self.errors(piece)
            parts.append(found if truth is None else found[~truth])
            rows += len(piece)
        normal = torch.from_numpy(np.concatenate(parts))
        if not len(normal):
            what = f"all {rows:,} validation rows are of {', '.join(self._anomaly)}, and none is normal"
            raise UserError("--anomaly", what, "give --threshold, or another class")
        value = threshold(normal, rate)
        if value is None:
            least = 1 / (len(normal) + 1)
            raise UserError(
                "--rate", f"{rate:g} of {len(normal):,} validation rows is less than one", f"give {least:.2g} or more"
            )
        return Threshold(value, rate, len(normal), int((normal > value).sum()))

    def errors(self, piece: Piece) -> NDArray[np.float32]:
        """(rows,): the squared error a number of each, at the scale that the net reads."""
        found: NDArray[np.float32] = (
            self.model.errors(piece.input, **told(self.model, self.model.told, piece)).cpu().numpy()
        )
        return found

    def detect(
        self, data: DataSpec | str | None = None, *, splits: Sequence[str] = (), label: str | None = None
    ) -> "Detection":
        """The rows to look at: by default the run's own test split. See `rows_of`."""
        if data is None and not splits:
            splits = ("test",)
        used = rows_of(self.model, data, splits=splits, label=label)
        if self._asked and not used.labelled:
            raise UserError(
                "--anomaly", "the rows have no labels to compare with", "name their column in --label, or leave it out"
            )
        return Detection(self, used)

    def _truth(self, piece: Piece) -> NDArray[np.bool_] | None:
        """Whether each row is an anomaly, by its label; None where nobody can say."""
        if piece.labels is None or not (self._anomaly or self._known):
            return None
        if self._anomaly:
            return np.isin(piece.labels.astype(str), self._anomaly)
        return ~np.isin(piece.labels.astype(str), self._known)

    def check_seen(self, labels: set[str]) -> None:
        """Raise UserError where a class was asked for that no row was of."""
        for name in self._asked:
            if name not in labels:
                raise UserError("--anomaly", f"no row has the label {name!r}", did_you_mean(name, labels))


class Detection:
    """Rows that are looked at once, piece by piece; then what was found of all of them."""

    def __init__(self, detector: Detector, used: RowsUsed) -> None:
        self._detector, self._used = detector, used
        self._errors: list[NDArray[np.float32]] = []
        self._truths: list[NDArray[np.bool_]] = []

    def tables(self) -> Iterator[pa.Table]:
        """Tables of the rows as they come: split, row and label as there are some, error, anomaly (whether above)."""
        labels: set[str] = set()
        for piece in self._used.pieces:
            errors, truth = self._detector.errors(piece), self._detector._truth(piece)
            if piece.labels is not None and len(labels) < MOST_NAMES:
                labels |= set(piece.labels.tolist())
            self._errors.append(errors)
            if truth is not None:
                self._truths.append(truth)
            above = errors > self._detector.threshold.value
            yield pa.table(which(piece) | {"error": pa.array(errors), "anomaly": pa.array(above)})
        self._detector.check_seen(labels)

    def found(self) -> dict[str, Any]:
        """Of all rows, once the tables are through: how many are above the threshold; of labelled ones the figures.

        `predicted` is what validation says of normal rows: between which numbers those above the threshold lie, and so
        the precision, given the anomalies that were found, with the probability CONFIDENCE. It has no anomalies, so
        `recall_interval` is what the counted ones say of it.
        """
        chosen = self._detector.threshold
        errors = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *self._errors]))
        above = errors > chosen.value
        found: dict[str, Any] = {
            "rows": len(errors),
            "flagged": int(above.sum()),
            "threshold": chosen.value,
            "rate": chosen.rate,
            "validation_rows": chosen.rows,
        }
        truth = torch.from_numpy(np.concatenate([np.empty(0, np.bool_), *self._truths]))
        if len(truth) != len(errors) or not bool(truth.any()):
            return found
        hits, alarms = int((above & truth).sum()), int((above & ~truth).sum())
        anomalies, normal = int(truth.sum()), int((~truth).sum())
        figures: dict[str, float | None] = {
            "precision": hits / (hits + alarms) if hits + alarms else None,
            "recall": hits / anomalies,
            "false_positive_rate": alarms / normal if normal else None,
            **separation(errors, truth),
        }
        found |= {"anomalies": anomalies, "metrics": figures, "recall_interval": share_between(hits, anomalies)}
        return found | {"predicted": _predicted(chosen, hits, alarms, normal)} if chosen.rows and normal else found


def _predicted(chosen: Threshold, hits: int, alarms: int, normal: int) -> Mapping[str, Any]:
    low, high = false_positives(normal, above=chosen.above, validation=chosen.rows)
    precision = [hits / (hits + count) if hits + count else None for count in (high, low)]
    return {
        "confidence": CONFIDENCE,
        "false_positives": [low, high],
        "false_positive_rate": [low / normal, high / normal],
        "precision": precision,
        "holds": low <= alarms <= high,
    }


def _trained_on(model: Coder) -> tuple[str, ...]:
    """The names of the classes that training had rows of; () where rows have none, or all are of one."""
    column = model.manifest.signature.columns.get("target")
    if not isinstance(column, Label) or column.names == UNLABELLED or "train" not in column.counts:
        return ()
    return tuple(name for name, rows in zip(column.names, column.counts["train"], strict=False) if rows)
