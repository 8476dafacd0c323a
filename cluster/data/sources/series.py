"""Series: the user's columns of numbers over time, or the El Nino's sea temperatures, as windows to forecast from."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from cluster.data.layouts import Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.series import Series, Windows
from cluster.data.sources.base import DataSpec, DrawnTestSpec, Fraction, Part, Source, absolute, even_parts
from cluster.data.sources.series_files import read_series
from cluster.data.split import Traits
from cluster.data.tabular import found_files
from nn_models.columns import Ahead, Numbers
from nn_models.columns import Sequence as Steps
from nn_models.spec import invalid

logger = logging.getLogger(__name__)

PART_WINDOWS = 4096
EL_NINO = Path(__file__).with_name("el_nino.csv")
Name = Annotated[str, Field(min_length=1)]


class WindowsSpec(DrawnTestSpec):
    """Base of the data sections of series: windows of steps, and the steps that follow, split in the order of time.

    See Windows for what of a test window may stand in the training part, and what may not.
    """

    window: PositiveInt = Field(24, description="steps that a forecast is made from")
    horizon: PositiveInt = Field(1, description="steps that are forecast")
    stride: PositiveInt = Field(1, description="steps from the beginning of a window to that of the next")
    season: PositiveInt | None = Field(
        None, description="steps after which much comes again: a forecast that says so is measured beside the model's"
    )
    relative: bool = Field(
        False,
        description="steps are read and forecast as differences to the last one that is read: for series that rise or "
        "fall (NLinear, Zeng et al. 2023)",
    )
    validation_fraction: Fraction = Field(0.1, description="share of each series' steps, before the test part")
    test_fraction: Fraction = Field(0.1, description="share of each series' steps, the last ones")

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to forecast."""
        raise NotImplementedError

    @property
    def others(self) -> tuple[str, ...]:
        """The columns that are read as well."""
        raise NotImplementedError

    @property
    def marks(self) -> Mapping[str, str | None]:
        """The columns `time` and `group`."""
        raise NotImplementedError

    def read(self, path: str | None = None, *, field: str = "data.path") -> Series:
        """The series, or those of other files with the same columns. Raises UserError for what cannot be used."""
        raise NotImplementedError

    def over(self, path: str, *, field: str) -> Source:
        """All windows of the series in other files, with what follows each. Raises UserError as `read` does."""
        series = self.read(path, field=field)
        windows = Windows(self.window, self.horizon, self.stride, 0.0, 0.0)
        starts = {"train": windows.starts(series)["train"]}
        return _Windows(series.values, starts, self.window, self._ahead(windows.changes(series, len(self.targets), 1)))

    def _ahead(self, changes: tuple[float, ...]) -> Ahead:
        return Ahead(
            steps=self.horizon,
            columns=(*self.targets, *self.others),
            targets=len(self.targets),
            changes=changes,
            season=self.season,
            relative=self.relative,
            **self.marks,
        )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.targets:
            raise invalid("names no column", "give at least one", field="target")
        seen: dict[str, str] = {}
        named = [*(("target", name) for name in self.targets), *(("covariates", name) for name in self.others)]
        for field, name in [*named, *((field, name) for field, name in self.marks.items() if name)]:
            if name in seen:
                raise invalid(f"{name} is named in {seen[name]} already", "name another column", field=field)
            seen[name] = field
        if self.season and self.season > self.window:
            raise invalid(
                f"{self.season} steps, which a window of {self.window} does not hold",
                "set a larger window, or leave the season out",
                field="season",
            )
        return self

    def open(self) -> Source:
        """See DataSpec."""
        series, targets = self.read(), len(self.targets)
        windows = Windows(self.window, self.horizon, self.stride, self.validation_fraction, self.test_fraction)
        starts = windows.starts(series)
        changes = windows.changes(series, targets, self.season or 1)
        for name in windows.constant(series, (*self.targets, *self.others)):
            logger.warning("data: column %s is constant in the training part: there is nothing to learn of it", name)
        return _Windows(series.values, starts, self.window, self._ahead(changes))


class SeriesSpec(WindowsSpec):
    """Your own series: columns of a CSV, Parquet or JSON-lines file, a step a row."""

    kind: Literal["series"] = "series"
    path: str = Field(min_length=1, description="a file, or a folder of such files, local or a URI")
    target: Name | tuple[Name, ...] = Field(description="the column to forecast, or several")
    covariates: tuple[Name, ...] = Field((), description="columns that are read beside it, but not forecast")
    time: Name | None = Field(None, description="the column of dates or numbers by which the rows are in order")
    group: Name | None = Field(None, description="the column that says which of several series a row belongs to")

    @property
    def targets(self) -> tuple[str, ...]:
        """See WindowsSpec."""
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def others(self) -> tuple[str, ...]:
        """See WindowsSpec."""
        return self.covariates

    @property
    def marks(self) -> Mapping[str, str | None]:
        """See WindowsSpec."""
        return {"time": self.time, "group": self.group}

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={"path": absolute(self.path, base)})

    def fingerprint(self) -> str:
        """See DataSpec: changes when a file does."""
        files = [(name, info.size, info.mtime_ns) for name, info in found_files(self.path, field="data.path")]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def read(self, path: str | None = None, *, field: str = "data.path") -> Series:
        """See WindowsSpec."""
        columns = (*self.targets, *self.others)
        return read_series(path or self.path, columns, time=self.time, group=self.group, field=field)


Sea = Literal["nino12", "nino3", "nino4", "nino34"]


class ElNinoSpec(WindowsSpec):
    """Monthly temperatures of four parts of the tropical Pacific, 1950 to 2010: a real series that is always there.

    In degrees Celsius, of the sea's surface: nino12 off the coast of Peru, nino3 and nino34 along the equator, nino4 in
    the west. From ERSST.v3b of the National Oceanic and Atmospheric Administration of the USA (Smith et al. 2008), as
    its Climate Prediction Center gives it; in the public domain.
    """

    kind: Literal["el_nino"] = "el_nino"
    target: tuple[Sea, ...] = Field(("nino12",), description="the seas to forecast")
    covariates: tuple[Sea, ...] = Field((), description="seas that are read beside these")
    horizon: PositiveInt = Field(12, description="months that are forecast")
    season: PositiveInt | None = Field(12, description="months after which much comes again")

    @property
    def targets(self) -> tuple[str, ...]:
        """See WindowsSpec."""
        return self.target

    @property
    def others(self) -> tuple[str, ...]:
        """See WindowsSpec."""
        return self.covariates

    @property
    def marks(self) -> Mapping[str, str | None]:
        """See WindowsSpec."""
        return {"time": "month"}

    def read(self, path: str | None = None, *, field: str = "data.path") -> Series:
        """See WindowsSpec."""
        return read_series(path or str(EL_NINO), (*self.targets, *self.others), time="month", field=field)


@dataclass(frozen=True)
class _Windows:
    """Windows of a series; `starts` are where they begin in `values` (steps, D), split by split."""

    values: NDArray[np.float32]
    starts: Mapping[str, NDArray[np.int64]]
    window: int
    ahead: Ahead

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        ahead = self.ahead
        numbers = Numbers(size=ahead.steps * ahead.targets, ahead=ahead)
        return {
            "input": StoredColumn(column=Steps(width=len(ahead.columns), length=self.window), dtype="float32"),
            "target": StoredColumn(column=numbers, dtype="float32"),
        }

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return {
            split: [
                Part(part.rows, (split, *part.what), f"windows of the {split} part")
                for part in even_parts(len(self.starts[split]), PART_WINDOWS)
            ]
            for split in self.starts
        }

    def traits(self, part: Part) -> Traits:
        """See Source."""
        return Traits()

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        split, first, end = part.what
        starts, ahead = self.starts[split][first:end, None], self.ahead
        past = self.values[starts + np.arange(self.window)]
        following = self.values[starts + self.window + np.arange(ahead.steps), : ahead.targets]
        if ahead.relative:
            last = past[:, -1:]
            past, following = past - last, following - last[..., : ahead.targets]
        return {"input": Dense(past), "target": Dense(following.reshape(part.rows, -1))}
