"""Progress of a sweep on standard error: a live table of trials on a terminal, a line a trial otherwise."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, get_args

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.submission.told import tell
from cluster.tuning.ledger import ENDED, Status, SweepState, TrialRecord
from cluster.tuning.space import columns

MAX_ROWS = 15
MAX_BEST_ROWS = 5  # of these so many at most are kept for the best: the rest is for the running ones
REFRESHES_PER_S = 2
COLOURS = {"running": "cyan", "finished": "green", "pruned": "bright_black", "failed": "red", "invalid": "yellow"}


class SweepProgress:
    """Called with the sweep's state whenever something has changed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = Console(stderr=True)
        self._state: SweepState | None = None
        self._known: dict[int, Status] = {}
        self._num_ended_before: int | None = None  # trials of a sweep that goes on
        self._live = (
            Live(console=self._console, get_renderable=self._shown, refresh_per_second=REFRESHES_PER_S, transient=True)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, state: SweepState) -> None:
        """Show what is new."""
        self._state = state
        if self._num_ended_before is None:
            # the last one may just have been refused
            self._num_ended_before = sum(record.status in ENDED for record in state.records[:-1])
            self._known = {record.index: record.status for record in state.records[:-1]}
        for record in state.records:
            before = self._known.get(record.index)
            self._known[record.index] = record.status
            if record.status in ENDED and before not in ENDED and not self._live:
                print(self._line(state, record), file=sys.stderr, flush=True)
                self._tell(state)

    def _tell(self, state: SweepState) -> None:
        """Have it in a submitted job's log."""
        best = state.best()
        tell(
            "trials",
            ended=sum(record.status in ENDED for record in state.records),
            ended_before=self._num_ended_before or 0,
            num_trials=state.num_trials,
            metric=state.target.metric,
            best=best.value if best else None,
        )

    def _line(self, state: SweepState, record: TrialRecord) -> str:
        found = f"{state.target.metric} {number(record.value)}" if record.value is not None else ""
        parts = [found, _epochs(record.epochs) if record.epochs else "", values(record.overrides)]
        if record.error:
            parts.append(first_line(record.error))
        told = "; ".join(part for part in parts if part)
        num_ended = sum(one.status in ENDED for one in state.records)
        return f"trial {record.index:<4} {record.status:8}  {told}  ({num_ended} of {state.num_trials} ended)"

    # -- on a terminal -----------------------------------------------------------------------------------------------

    def _shown(self) -> RenderableType:
        state = self._state
        if state is None:
            return Text(f"{self._name}: starting")
        return Group(Text(self.summary(state)), self.table(state))

    def summary(self, state: SweepState) -> str:
        """One line: how far, the best so far, how quick."""
        elapsed_s = max(time.time() - state.began, 1e-3)
        num_ended = sum(record.status in ENDED for record in state.records)
        parts = [f"{self._name}: {num_ended} of {state.num_trials} trials ended", counts(state.records)]
        best = state.best()
        if best:
            parts.append(f"best {state.target.metric} {number(best.value)} (trial {best.index})")
        here = num_ended - (self._num_ended_before or 0)
        if here:
            parts.append(f"{3600 * here / elapsed_s:,.0f} trials/hour")
        minutes, seconds = divmod(int(elapsed_s), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}")
        return ", ".join(part for part in parts if part)

    def table(self, state: SweepState) -> Table:
        """The best trials, those that run, and what ended last, as far as there is room."""
        table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
        for head in ("trial", "status"):
            table.add_column(head, no_wrap=True)
        for head in (state.target.metric, "epochs"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("values", no_wrap=True, overflow="ellipsis", ratio=1)
        best = state.best()
        for record in chosen_rows(state):
            style = "bold" if best and record.index == best.index else ""
            table.add_row(
                str(record.index),
                Text(record.status, style=COLOURS.get(record.status, "")),
                number(record.value),
                str(record.epochs or ""),
                Text(first_line(record.error) if record.error else values(record.overrides)),
                style=style,
            )
        return table


def chosen_rows(state: SweepState) -> list[TrialRecord]:
    """At most MAX_ROWS trials: the best ones first, then those that run, then the newest of the others."""
    sign = -1 if state.target.mode == "max" else 1
    records = list(state.records)  # trials are added while this reads
    ended = [record for record in records if record.status in ("finished", "pruned") and record.value is not None]
    first = state.best()
    ended.sort(key=lambda record: (record is not first, sign * (record.value or 0.0), record.index))
    running = [record for record in records if record.status == "running"]
    rows = ended[:MAX_BEST_ROWS] + running
    if first and first not in rows:
        rows.insert(0, first)
    shown = {record.index for record in rows}
    rows += [record for record in reversed(records) if record.index not in shown and record.status in ENDED]
    return rows[:MAX_ROWS]


def counts(records: Sequence[TrialRecord]) -> str:
    """How many trials have each status."""
    found = {status: sum(record.status == status for record in records) for status in get_args(Status)}
    return ", ".join(f"{count} {status}" for status, count in found.items() if count)


def values(overrides: Mapping[str, Any]) -> str:
    """What a trial was given, by the last part of each path where that tells it from the others."""
    told = columns(overrides)
    last = [path.rpartition(".")[2] for path in told]
    names = [name if last.count(name) == 1 else path for path, name in zip(told, last, strict=True)]
    given = (number(value) if isinstance(value, float) else value for value in told.values())
    return ", ".join(f"{name} {value}" for name, value in zip(names, given, strict=True))


def number(value: float | None) -> str:
    """Four digits."""
    return "" if value is None else f"{value:.4g}"


def first_line(text: str) -> str:
    """Enough of an error to know it by."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"
