"""Metric: a figure that an objective reports: its name, which way is better, and how people read it."""

from typing import Literal, NamedTuple

Better = Literal["less", "more"]


class Metric(NamedTuple):
    """`name` is as in metrics.jsonl; one that ends in accuracy or agreement is a share, and shown in per cent."""

    name: str
    better: Better | None = None  # None: nobody but the user can say
    words: str = ""  # as people read it; the name in words where it is left out
    short: str = ""  # as it stands on a progress bar, where it shall stand there
    floor_of: str = ""  # the metric of which this one is the level that perfect rows would reach


LOSS = Metric("loss", "less")


class Reported(NamedTuple):
    """What a recipe reports of each epoch: of training, and of a look at held-out rows."""

    train: tuple[Metric, ...]
    validation: tuple[Metric, ...]
    best: str | None  # the name of the validation metric by which the best weights are chosen; None: the last ones
