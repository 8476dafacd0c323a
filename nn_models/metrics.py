"""Metric: a figure that an objective reports: its name, which way is better, and how people read it."""

from typing import Literal, NamedTuple

Better = Literal["less", "more"]


class Metric(NamedTuple):
    """`name` is as in metrics.jsonl; one that ends in accuracy or agreement is a share, and shown in per cent.

    Metrics that say `together` share one chart of that title, where they are all there; there they are called by their
    `label`.
    """

    name: str
    better: Better | None = None  # None: nobody but the user can say
    words: str = ""  # as people read it; the name in words where it is left out
    short: str = ""  # as it stands on a progress bar, where it shall stand there
    floor_of: str = ""  # the metric of which this one is the level that perfect rows would reach
    together: str = ""  # title of the chart that it shares; `loss`: one of the losses that the objective has several of
    label: str = ""  # in that chart

    @property
    def in_words(self) -> str:
        """As people read it."""
        return self.words or self.name.replace("_", " ")

    @property
    def is_share(self) -> bool:
        """Whether it lies between 0 and 1, and is shown in per cent."""
        return self.name.endswith(("accuracy", "agreement"))


LOSS = Metric("loss", "less")


class Reported(NamedTuple):
    """What a recipe reports of each epoch: of training, and of a look at held-out rows."""

    train: tuple[Metric, ...]
    validation: tuple[Metric, ...]
    best: str | None  # the name of the validation metric by which the best weights are chosen; None: the last ones
