"""Tail: the lines of a run's metrics handed on while it runs, wherever the loop is."""

import threading
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, Self

from cluster.errors import Lost
from cluster.training.run_directory import RunDirectory, read_metrics
from nn_models.errors import UserError

Listener = Callable[[Mapping[str, Any]], None]  # called with each line of metrics


def heard_by(*listeners: Listener) -> Listener:
    """One that hands each line to all of these."""

    def heard(line: Mapping[str, Any]) -> None:
        for listener in listeners:
            listener(line)

    return heard


class Tail:
    """Hands each new line of metrics.jsonl to the listener, wherever the loop runs."""

    def __init__(self, directory: RunDirectory, listener: Listener) -> None:
        self._directory, self._listener = directory, listener
        self._seen = read_metrics(directory)  # of a run that is continued
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()  # what is left

    def _follow(self) -> None:
        while not self._stop.wait(0.5 if self._directory.folder.local else 5.0):
            self._read()

    def _read(self) -> None:
        try:
            lines = read_metrics(self._directory)
        except (Lost, UserError):  # whoever writes there says so, and better
            return
        # a restart drops the lines that came after its checkpoint, and writes them anew
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._seen, lines, strict=False)))
        for line in lines[same:]:
            self._listener(line)
        self._seen = lines
