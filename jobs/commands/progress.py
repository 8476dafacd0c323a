"""Progress of a run on standard error: a bar on a terminal, a line an epoch otherwise."""

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column

NO_METRICS = ("step", "epoch", "split", "time_s", "rows_per_s", "learning_rate", "grad_norm", "rows_digest")

# Of a GAN's many metrics those that fit on a line, in this order and under these names.
OF_A_GAN = {
    "frechet_distance": "Frechet",
    "frechet_floor": "floor",
    "label_agreement": "label agreement",
    "diversity": "diversity",
    "generator_loss": "generator",
    "discriminator_loss": "discriminator",
    "l1": "L1",
    "real_accuracy": "right on real",
    "fake_accuracy": "on made",
}
BEST_BY = ("frechet_distance", "l1", "diversity")  # the first that is there stands on the bar, with the losses


class Progress:
    """Called with each line of metrics."""

    def __init__(self, name: str, *, epochs: int) -> None:
        self._console = Console(stderr=True)
        self._epochs = epochs
        # of a terminal of 80 columns half is for the figures
        figures = TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns = (TextColumn("{task.description}"), BarColumn(20), figures, TimeElapsedColumn())
        self._bar = (
            Bar(*columns, console=self._console, transient=True, expand=True) if self._console.is_terminal else None
        )
        self._task = self._bar.add_task(name, total=epochs, metrics="starting") if self._bar else None
        self._game: dict[str, float] = {}  # a GAN's last metrics of any split

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
        if self._bar and self._task is not None:
            done = line["epoch"] + 1 if line.get("end_of_epoch") else None
            self._bar.update(self._task, completed=done, metrics=self._on_the_bar(str(line["split"]), metrics))
        elif ended or line["split"] == "test":
            print(
                f"{self._place(line):12} {line['split']:10} {_text(metrics)}  ({line['time_s']:.1f} s)",
                file=sys.stderr,
                flush=True,
            )

    def _place(self, line: Mapping[str, Any]) -> str:
        if line["split"] == "test":
            return "end"
        return f"epoch {line['epoch'] + 1}/{self._epochs}" if line["step"] else "untrained"

    def _on_the_bar(self, split: str, metrics: Mapping[str, float]) -> str:
        if not _of_a_gan(metrics):
            return f"{split} {_text(metrics)}"
        self._game |= metrics
        parts = [_text_of_a_gan(self._game, [name for name in BEST_BY if name in self._game][:1])]
        if {"generator_loss", "discriminator_loss"} <= set(self._game):
            parts.append(f"losses {self._game['generator_loss']:.3f} / {self._game['discriminator_loss']:.3f}")
        return "  ".join(parts)


def _of_a_gan(metrics: Mapping[str, float]) -> bool:
    return "discriminator_loss" in metrics or "diversity" in metrics


def _text(metrics: Mapping[str, float]) -> str:
    if _of_a_gan(metrics):
        return _text_of_a_gan(metrics, list(OF_A_GAN))
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _text_of_a_gan(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """The metrics of these names; a Frechet distance is large, or rounded to what can be told of it."""
    known = {OF_A_GAN[name]: metrics[name] for name in names if name in metrics}
    return "  ".join(f"{name} {value:.{3 if abs(value) < 10 else 1}f}" for name, value in known.items())
