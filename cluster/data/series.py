"""Series: rows of numbers in the order of time, of one group or of many, and the windows that they are cut into."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.data.manifest import SPLITS
from cluster.data.times import Times
from nn_models.errors import UserError


@dataclass(frozen=True)
class Series:
    """Groups of steps, one after the other: `values` (steps, D), of group g those from offsets[g] to offsets[g + 1]."""

    values: NDArray[np.float32]
    offsets: NDArray[np.int64]
    names: tuple[str | None, ...]  # of the groups; one without a name where there are no groups
    times: Times | None = None  # (steps,)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each group."""
        return np.diff(self.offsets)

    def groups(self) -> Iterator[tuple[str | None, slice]]:
        """Each group's name, and where its steps are."""
        ends = self.offsets.tolist()
        for name, first, end in zip(self.names, ends[:-1], ends[1:], strict=True):
            yield name, slice(first, end)


@dataclass(frozen=True)
class Windows:
    """Where windows begin in a series: of `window` steps that are read, and `horizon` steps that follow.

    The last `test` share of each group's steps is its test part, what is before that its validation part, and all
    before these its training part. A window belongs to the part in which all that it is to forecast lies; one whose
    steps ahead lie in two parts is left out. What it reads may lie in the parts before: when a forecast is made that is
    known. So no step of the test or validation part is read, or forecast, or scaled by, in training; and no step that
    is forecast in training is forecast in validation or test. Groups have borders of their own: where they end at
    different times, training steps of one may be later than test steps of another.
    """

    window: int
    horizon: int
    stride: int
    validation: float
    test: float

    def borders(self, length: int) -> tuple[int, int]:
        """Where the validation part of so many steps begins, and where it ends."""
        test, validation = round(length * self.test), round(length * self.validation)
        return max(0, length - test - validation), length - test

    def starts(self, series: Series) -> dict[str, NDArray[np.int64]]:
        """Split -> where its windows begin, group after group. Raises UserError where there are none."""
        self._check_lengths(series)
        found: dict[str, list[NDArray[np.int64]]] = {split: [] for split in SPLITS}
        for first, length in zip(series.offsets[:-1].tolist(), series.lengths.tolist(), strict=True):
            border, end = self.borders(length)
            starts = np.arange(0, length - self.window - self.horizon + 1, self.stride)
            ahead, until = starts + self.window, starts + self.window + self.horizon
            for split, chosen in (
                ("train", until <= border),
                ("validation", (ahead >= border) & (until <= end)),
                ("test", ahead >= end),
            ):
                found[split].append(first + starts[chosen])
        windows = {split: np.concatenate(starts) for split, starts in found.items()}
        self._check_splits(windows, int(series.lengths.max()))
        return windows

    def changes(self, series: Series, targets: int, season: int) -> tuple[float, ...]:
        """Of the first columns: the mean size of a change over a season in the training parts; 0 where there is none.

        That is the mean absolute error of the (seasonal) naive forecast of one step there (Hyndman & Koehler 2006).
        """
        total, num = np.zeros(targets), 0
        for first, length in zip(series.offsets[:-1].tolist(), series.lengths.tolist(), strict=True):
            part = series.values[first : first + self.borders(length)[0], :targets].astype(np.float64)
            changed = np.abs(part[season:] - part[:-season])
            total, num = total + changed.sum(0), num + len(changed)
        return tuple((total / max(num, 1)).tolist())

    def constant(self, series: Series, names: Sequence[str]) -> list[str]:
        """Those of the columns that have one value in all training parts."""
        parts = [
            series.values[where][: self.borders(length)[0]]
            for (_, where), length in zip(series.groups(), series.lengths.tolist(), strict=True)
        ]
        whole = np.concatenate(parts)
        return [name for name, low, high in zip(names, whole.min(0), whole.max(0), strict=True) if low == high]

    def _check_lengths(self, series: Series) -> None:
        needed = self.window + self.horizon
        short = np.flatnonzero(series.lengths < needed)
        if not len(short):
            return
        some = ", ".join(f"{series.names[place]!r} of {series.lengths[place]}" for place in short[:5].tolist())
        what = f"but the series has {series.lengths[0]}"
        if series.names != (None,):
            more = ", …" if len(short) > 5 else ""
            what = f"but {len(short):,} of {len(series.names):,} groups have fewer: {some}{more}"
        raise UserError(
            "data.window",
            f"{self.window} steps and {self.horizon} ahead are {needed}, {what}",
            "set a smaller window or horizon" + ", or drop those groups" * (series.names != (None,)),
        )

    def _check_splits(self, windows: Mapping[str, NDArray[Any]], longest: int) -> None:
        border, end = self.borders(longest)
        steps = {"train": border, "validation": end - border, "test": longest - end}
        for split, asked in (("train", True), ("validation", self.validation > 0), ("test", self.test > 0)):
            if not asked or len(windows[split]):
                continue
            needed = f"{self.window + self.horizon} (window and horizon)" if split == "train" else f"{self.horizon}"
            raise UserError(
                "data" if split == "train" else f"data.{split}_fraction",
                f"the {split} part of a series of {longest} steps has {steps[split]}, where a window needs "
                f"{needed} there",
                "lower window, horizon, validation_fraction or test_fraction"
                if split == "train"
                else "raise it, or set a smaller horizon or stride",
            )
