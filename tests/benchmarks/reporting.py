"""Reporting: thirty half-second epochs on two workers, a checkpoint and metrics each, against the same with neither.

Compared is the time from the first epoch's end to the last's. The other side is manta too, which checkpoints only at
the end and writes one line of metrics an epoch.
"""

from typing import Any

from measuring import Case, epoch_ends, fashion, fashion_recipe, in_turn, options, publish, scratch

import cluster
from cluster.data.shards import DataSet

SELDOM = {"checkpoint_every_epochs": 1_000_000, "log_every_steps": 1_000_000}


def training_s(data: DataSet, *, epochs: int, **train: Any) -> float:
    with scratch() as folder:
        recipe = fashion_recipe("mlp", data, epochs=epochs, cpus_per_worker=1, **train)
        cluster.train(recipe, num_workers=2, run=str(folder / "run"))
        ends = epoch_ends(folder / "run")
    return ends[-1] - ends[0]


def main() -> None:
    chosen = options(__doc__, repetitions=3, epochs=30, rows=12_800)
    with scratch() as folder:
        data = fashion(folder / "data", rows=chosen.rows)
        pairs = in_turn(
            chosen.repetitions,
            lambda: training_s(data, epochs=chosen.epochs),
            lambda: training_s(data, epochs=chosen.epochs, **SELDOM),
            warm_up=False,
        )
    publish("reporting", [Case("mlp", "<= 1.05", "s", pairs)], workers=2, epochs=chosen.epochs, rows=chosen.rows)


if __name__ == "__main__":
    main()
