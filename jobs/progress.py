"""Progress of a run on standard error: a bar on a terminal, a line an epoch otherwise."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

NO_METRICS = ("step", "epoch", "split", "time_s", "rows_per_s", "learning_rate", "grad_norm", "rows_digest")


class Progress:
    """Called with each line of metrics."""

    def __init__(self, name: str, *, epochs: int) -> None:
        self._console = Console(stderr=True)
        self._epochs = epochs
        figures = TextColumn("{task.fields[metrics]}")
        columns = (TextColumn("{task.description}"), BarColumn(), figures, TimeElapsedColumn())
        self._bar = Bar(*columns, console=self._console, transient=True) if self._console.is_terminal else None
        self._task = self._bar.add_task(name, total=epochs, metrics="starting") if self._bar else None
        self._train: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Show one line of metrics."""
        metrics = {name: value for name, value in line.items() if name not in NO_METRICS and isinstance(value, float)}
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        ended = line["split"] == "validation" or (line["split"] == "train" and line.get("end_of_epoch"))
        if self._bar and self._task is not None:
            done = line["epoch"] + 1 if line.get("end_of_epoch") else None
            self._bar.update(self._task, completed=done, metrics=f"{line['split']} {text}")
        elif ended or line["split"] == "test":
            place = f"epoch {line['epoch'] + 1}/{self._epochs}" if ended else "end"
            print(f"{place:12} {line['split']:10} {text}  ({line['time_s']:.1f} s)", file=sys.stderr, flush=True)
