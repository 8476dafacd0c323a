"""Importance: which of a sweep's values tell how well a trial did, by a random forest and shuffled columns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jobs.report.files import AbsentError
from jobs.report.trials import Column, Trial

LEAST_TRIALS = 8
NUM_FORESTS = 5
NUM_TREES = 100
NUM_SHUFFLES = 10


class Importance(NamedTuple):
    """What was found; each number is the loss of R2 when one column is shuffled, over the trials' ranks."""

    rows: list[tuple[str, float, float]]  # path, mean, deviation over the forests and shuffles; the largest first
    noise: float  # what columns of random numbers get
    explained: float  # R2 of trials that a tree was not fitted to
    num_trials: int


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
    from sklearn.inspection import permutation_importance

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
        random = np.random.default_rng(seed).random((len(valued), 1))
        inputs = np.hstack([table, random])
        forest = RandomForestRegressor(NUM_TREES, oob_score=True, random_state=seed).fit(inputs, order)
        shuffled = permutation_importance(forest, inputs, order, n_repeats=NUM_SHUFFLES, random_state=seed)
        found.append(shuffled.importances)
        explained.append(forest.oob_score_)
    spread = np.concatenate(found, axis=1)
    rows = [
        (column.path, float(values.mean()), float(values.std()))
        for column, values in zip(varying, spread, strict=False)  # the last one is the random numbers'
    ]
    rows.sort(key=lambda row: -row[1])
    return Importance(rows, float(spread[-1].mean()), float(np.mean(explained)), len(valued))


def _cell(trial: Trial, column: Column) -> float:
    return column.place(trial.values[column.path]) if column.path in trial.values else float("nan")
