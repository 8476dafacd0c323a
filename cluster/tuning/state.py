"""A sweep while it runs, for those who watch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.tuning.ledger import Status, TrialRecord
from cluster.tuning.target import Target

EPOCH = "epoch"  # in what a trial reports: epochs done, which is Tune's time
SweepListener = Callable[["SweepState"], None]  # called whenever something has changed


@dataclass
class SweepState:
    """A sweep while it runs, for those who watch."""

    target: Target
    num_trials: int
    concurrency: int
    records: list[TrialRecord] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    def best(self) -> TrialRecord | None:
        """The best trial so far: of those that came to their end, where there are any."""
        sign = -1 if self.target.mode == "max" else 1
        for statuses in (("finished",), ("pruned", "running")):
            found = [r for r in self.records if r.status in statuses and r.value is not None]
            if found:
                return min(found, key=lambda record: (sign * (record.value or 0.0), record.index))
        return None

    def count(self, status: Status) -> int:
        """Trials of this status."""
        return sum(record.status == status for record in self.records)
