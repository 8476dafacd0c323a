"""Going on: how a run or sweep that was cut short is taken up again, said even where Ray takes this process along."""

import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.errors import Lost
from cluster.runtime import RaySession
from cluster.runtime.lifeline import POLL_S
from cluster.storage import Folder

# After Ray has gone: a call of its own that then never returns, where this process should have taken notice by now.
LAST_WORD_S = 12.0
EXIT_CODE = 1


def command(verb: str, run: str, options: Mapping[str, Any], *, use_gpu: bool) -> str:
    """The line that takes up the run or sweep (`verb` is the subcommand) again; options that are None are left out."""
    recipe = (Folder(run) / "recipe.yaml").uri if "://" in run else f"{run.rstrip('/')}/recipe.yaml"
    line = f"manta {verb} {shlex.quote(recipe)} --run {shlex.quote(run)} --resume"
    line += "".join(f" {name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
    return line + " --gpu" * use_gpu


@dataclass
class Began:
    """Whether a run or sweep has begun, so that there is something to go on with."""

    begun: bool = False


@contextmanager
def telling_how(line: str) -> Iterator[Began]:
    """Add to what is raised as Lost the line to go on with, once the block has said that the run has begun."""
    began = Began()
    try:
        yield began
    except Lost as error:
        if began.begun:
            raise type(error)(f"{error}; to go on: {line}") from None
        raise


@contextmanager
def last_word(session: RaySession | None, say: Callable[[str], str]) -> Iterator[None]:
    """End this process while the block runs, should it hang in a Ray that has gone, before Ray does so silently.

    `say` leaves what is to be left in the run's directory, and returns what is told on standard error.
    """
    over = threading.Event()

    def watch(session: RaySession) -> None:
        lost_at: float | None = None
        while not over.wait(POLL_S):
            reason = None if session.starting else session.lost()
            lost_at = (lost_at or time.monotonic()) if reason else None
            if reason and lost_at and time.monotonic() - lost_at > LAST_WORD_S:
                print(f"error: {say(reason)}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    thread = None
    if session is not None:
        thread = threading.Thread(target=watch, args=(session,), name="last word", daemon=True)
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread:
            thread.join()
