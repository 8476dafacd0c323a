"""Importance: which of a sweep's values tell how well a trial did, by a random forest and shuffled columns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.report.files import AbsentError
from jobs.report.trials import Column, Trial

Array = NDArray[Any]

LEAST_TRIALS = 8
NUM_FORESTS = 3
NUM_TREES = 100
NUM_SHUFFLES = 20


class Importance(NamedTuple):
    """What was found; each number is the loss of R2 when one column is shuffled, over the trials' ranks."""

    rows: list[tuple[str, float, float]]  # path, mean, deviation over the forests and shuffles; the largest first
    noise: float  # what columns of random numbers get
    explained: float  # R2 of trials that a tree was not fitted to
    num_trials: int
    num_forests: int = NUM_FORESTS
    num_trees: int = NUM_TREES


def importance(trials: Sequence[Trial], columns: Sequence[Column]) -> Importance:
    """Permutation importance (Breiman 2001) in forests that predict a trial's rank from its values.

    Ranks, so that one trial that diverged does not decide it all. Each forest sees a column of random numbers as well:
    what is no more important than that one may well not matter. Raises AbsentError where nothing can be told.
    """
    valued = [trial for trial in trials if trial.value is not None]
    varying = [column for column in columns if len({str(trial.values.get(column.path)) for trial in valued}) > 1]
    if len(valued) < LEAST_TRIALS:
        raise AbsentError(f"it takes {LEAST_TRIALS} trials with a value, and here are {len(valued)}")
    if not varying:
        raise AbsentError("all trials with a value have the same values")
    from sklearn.ensemble import RandomForestRegressor

    table = np.array([[_cell(trial, column) for column in varying] for trial in valued])
    for column in table.T:  # absent, as in a section that was not chosen: apart from all that are there
        present = column[~np.isnan(column)]
        column[np.isnan(column)] = present.min() - 1 - np.ptp(present)
    results = np.array([trial.value for trial in valued])
    order = np.unique(results, return_inverse=True)[1] / max(1, len(set(results)) - 1)
    if np.ptp(order) == 0:
        raise AbsentError("all trials came to the same value")
    found, explained = [], []
    for seed in range(NUM_FORESTS):
        rng = np.random.default_rng(seed)
        inputs = np.hstack([table, rng.random((len(valued), 1))])
        forest = RandomForestRegressor(NUM_TREES, oob_score=True, random_state=seed).fit(inputs, order)
        found.append(_lost_by_shuffling(forest.predict, inputs, order, rng))
        explained.append(forest.oob_score_)
    spread = np.concatenate(found, axis=1)
    rows = [
        (column.path, float(values.mean()), float(values.std()))
        for column, values in zip(varying, spread, strict=False)  # the last one is the random numbers'
    ]
    rows.sort(key=lambda row: -row[1])
    return Importance(rows, float(spread[-1].mean()), float(np.mean(explained)), len(valued))


def _lost_by_shuffling(
    predict: Callable[[Array], Array], inputs: Array, order: Array, rng: np.random.Generator
) -> Array:
    """The loss of R2 for each column and shuffle; all of them are predicted at once, as each call takes its time."""
    num_rows, num_columns = inputs.shape
    shuffled = np.tile(inputs, (num_columns, NUM_SHUFFLES, 1, 1))
    for column in range(num_columns):
        for times in range(NUM_SHUFFLES):
            rng.shuffle(shuffled[column, times, :, column])
    told = predict(shuffled.reshape(-1, num_columns)).reshape(num_columns, NUM_SHUFFLES, num_rows)
    errors: Array = np.square(told - order).mean(axis=2)
    lost: Array = (errors - np.square(predict(inputs) - order).mean()) / order.var()
    return lost


def _cell(trial: Trial, column: Column) -> float:
    return column.place(trial.values[column.path]) if column.path in trial.values else float("nan")
