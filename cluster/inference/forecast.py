"""forecast: how series go on, by a run's best model, from RUN/model alone."""

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cluster.data.series import Series
from cluster.data.sources.series import WindowsSpec
from cluster.data.sources.series_files import read_series
from cluster.data.times import Times, as_arrow, following
from cluster.runs.opened import Forecaster, open_model
from nn_models.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecasts:
    """What follows the end of each group: `values` (groups, steps, columns) in the file's units, `times` as theirs."""

    groups: tuple[str | None, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float32]
    times: tuple[Times, ...]  # of each group (steps,)

    def table(self) -> pa.Table:
        """A row for each group, step and column: time, group where there are several, step from 1, column, value."""
        groups, steps, columns = self.values.shape
        found = {
            "time": as_arrow(np.repeat(np.concatenate(self.times), columns)),
            "group": pa.array(np.repeat(np.array(self.groups, np.object_), steps * columns), pa.string()),
            "step": np.tile(np.repeat(np.arange(1, steps + 1), columns), groups),
            "column": list(self.columns) * (groups * steps),
            "value": self.values.ravel(),
        }
        if self.groups == (None,):
            del found["group"]
        return pa.table(found)


def forecast(run: str, *, data: str | None = None, device: torch.device | None = None) -> Forecasts:
    """The steps that follow the end of the series in the file `data`, or of those that the run was trained on.

    The file has the columns of the run's data: those that are read, and those of times and of groups. Times go on by
    their regular step; without times they are the numbers of rows. Raises UserError where the run forecasts nothing,
    and for series that do not fit.
    """
    model = open_model(run, device=device)
    if not isinstance(model, Forecaster):
        kind = model.recipe.objective.kind
        raise UserError(run, f"a model trained for {kind}, which forecasts no series", "give the run of a forecast")
    ahead, source = model.ahead, model.recipe.data
    if data is not None:
        series = read_series(data, ahead.columns, time=ahead.time, group=ahead.group, field="DATA")
    elif isinstance(source, WindowsSpec):
        series = source.read()
    else:
        raise UserError("DATA", f"{source.kind} keeps no whole series", "name the file with the series to go on from")
    _check_lengths(series, model.window, data or "data")
    past = np.stack([series.values[where][-model.window :] for _, where in series.groups()])
    values = model.forecast(past).cpu().numpy()
    return Forecasts(series.names, ahead.names, values, tuple(_times(series, ahead.steps)))


def _check_lengths(series: Series, window: int, where: str) -> None:
    short = [(name, length) for name, length in zip(series.names, series.lengths, strict=True) if length < window]
    if short:
        name, length = short[0]
        of = "" if name is None else f" of {name!r}" + (f" and {len(short) - 1:,} other groups" * (len(short) > 1))
        raise UserError(where, f"{length} steps{of}, but a forecast is made from {window}", "give a longer series")


def _times(series: Series, steps: int) -> list[Times]:
    """Of each group the next times."""
    found, uneven = [], []
    for name, where in series.groups():
        if series.times is None:
            length = where.stop - where.start
            found.append(np.arange(length, length + steps))
            continue
        times = series.times[where]
        if len(times) < 2:
            raise UserError("DATA", "one time, which says nothing of the next", "give at least two steps")
        after, regular = following(times, steps)
        found.append(after)
        uneven += [] if regular else [name]
    if uneven:
        of = f" of {len(uneven):,} groups, such as {uneven[0]!r}," if uneven[0] is not None else ""
        logger.warning("times%s are not evenly spaced: those of the forecast go on by the commonest step", of)
    return found
