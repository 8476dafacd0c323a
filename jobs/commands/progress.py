"""Progress of a run on standard error: a bar on a terminal, a line an epoch otherwise."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column

from cluster.submission.told import EVERY_S, tell
from nn_models.metrics import LOSS, Metric
from nn_models.zoo import METRICS

if TYPE_CHECKING:
    from cluster.recipe.recipe import Recipe

NO_METRICS = ("step", "epoch", "split", "time_s", "rows_per_s", "learning_rate", "grad_norm", "rows_digest")


class Progress:
    """Called with each line of metrics.

    Where metrics have short words (nn_models/metrics.py), only these stand on a line, in the order in which the
    recipe's objective declares them; without a recipe, any objective. Others stand there by their names.
    """

    def __init__(self, name: str, *, epochs: int, recipe: "Recipe | None" = None) -> None:
        self._recipe = recipe
        self._declared = tuple(METRICS.values()) if recipe is None else recipe.objective.known_metrics()
        self._console = Console(stderr=True)
        self._epochs = epochs
        # of a terminal of 80 columns half is for the figures
        figures = TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns = (TextColumn("{task.description}"), BarColumn(20), figures, TimeElapsedColumn())
        self._bar = (
            Bar(*columns, console=self._console, transient=True, expand=True) if self._console.is_terminal else None
        )
        self._task = self._bar.add_task(name, total=epochs, metrics="starting") if self._bar else None
        self._seen: dict[str, float] = {}  # the last metrics with short words, of any split
        self._told_at = 0.0

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
        ended = line["split"] == "validation" or (line["split"] == "train" and line.get("end_of_epoch"))
        self._tell(line, metrics, whole=bool(ended and line["step"]))
        if self._bar and self._task is not None:
            done = line["epoch"] + 1 if line.get("end_of_epoch") else None
            self._bar.update(self._task, completed=done, metrics=self._on_the_bar(str(line["split"]), metrics))
        elif ended or line["split"] == "test":
            print(
                f"{self._place(line):12} {line['split']:10} {self._text(metrics)}  ({line['time_s']:.1f} s)",
                file=sys.stderr,
                flush=True,
            )

    def _tell(self, line: Mapping[str, Any], metrics: Mapping[str, float], *, whole: bool) -> None:
        """Have it in a submitted job's log: at the end of an epoch, and now and then within one."""
        now = time.monotonic()
        if not whole and line["split"] != "test" and now - self._told_at < EVERY_S:
            return
        self._told_at = now
        named = {f"{line['split']}/{name}": value for name, value in metrics.items()}
        epoch = min(line["epoch"] + 1, self._epochs)
        tell("epoch", epoch=epoch, epochs=self._epochs, step=line["step"], whole=whole, metrics=named)

    def _place(self, line: Mapping[str, Any]) -> str:
        if line["split"] == "test":
            return "end"
        return f"epoch {line['epoch'] + 1}/{self._epochs}" if line["step"] else "untrained"

    def _on_the_bar(self, split: str, metrics: Mapping[str, float]) -> str:
        """Half a line: what the best is chosen by, and the losses where there are several."""
        if not self._short(metrics):
            return f"{split} {self._text(metrics)}"
        self._seen |= metrics
        known = self._short(self._seen)
        parts = [_short_text(self._seen, self._leading(known))]
        losses = [self._seen[metric.name] for metric in known if metric.together == LOSS.name]
        if len(losses) > 1:
            parts.append(f"losses {' / '.join(f'{loss:.3f}' for loss in losses)}")
        return "  ".join(parts)

    def _leading(self, known: Sequence[Metric]) -> list[Metric]:
        """The one that says most: that which has a floor, else what the best is chosen by, else the first."""
        floored = {metric.floor_of for metric in self._declared}
        best = None
        if self._recipe:  # asked only here: by now it is known that its model and objective go together
            best = self._recipe.objective.reported(self._recipe.model, None).best
        judged = [metric for metric in known if metric.better]
        return sorted(judged, key=lambda metric: (metric.name not in floored, metric.name != best))[:1]

    def _short(self, metrics: Mapping[str, float]) -> list[Metric]:
        """Those of the metrics that have short words, in the order in which they are declared."""
        return [metric for metric in self._declared if metric.short and metric.name in metrics]

    def _text(self, metrics: Mapping[str, float]) -> str:
        if known := self._short(metrics):
            return _short_text(metrics, known)
        return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _short_text(metrics: Mapping[str, float], known: Sequence[Metric]) -> str:
    """Figures under their short words; a distance may be large, and is rounded to what can be told of it."""
    values = {metric.short: metrics[metric.name] for metric in known}
    return "  ".join(f"{short} {value:.{3 if abs(value) < 10 else 1}f}" for short, value in values.items())
