"""Real signals to Ray's processes, and what a run directory says."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from ray.util import placement_group_table
from safetensors.torch import load_file

MARK = "MANTA_TEST"  # in the environment of a driver and all that it starts


def steps_done(run: Path) -> int:
    try:
        text = (run / "metrics.jsonl").read_text()
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")), default=0)


def digests(run: str | Path) -> list[str]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line["rows_digest"] for line in lines if "rows_digest" in line]


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model.safetensors")


def wait_for(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Poll: how long starting processes takes differs widely between machines."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def processes(*titles: str) -> list[psutil.Process]:
    """Those of this session's Ray with one of the titles in theirs, never another's.

    Ray writes an actor's title anew for each call: one can be missed.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            line = " ".join(process.cmdline())
            if any(title in line for title in titles):
                found.append(process)
    return found


def all_is_free(ray) -> bool:
    """Whether no placement group is left and every CPU is free; Ray says so a little later than it is so."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return not groups and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@contextmanager
def killing(
    title: str, *, when: Callable[[], object] = lambda: True, number: int = 0, by: int = signal.SIGKILL
) -> Iterator[None]:
    """While the block goes on: a signal to the process of this number among those with the title, once `when` holds."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        wait_for(lambda: when() or over.is_set())
        while len(found := processes(title)) <= number and not over.wait(0.01):
            pass
        if len(found) > number:
            found[number].send_signal(by)
            killed.append(found[number].pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
    assert killed, f"no process of {title!r} was met"


def left_over(mark: dict[str, str]) -> list[psutil.Process]:
    """Processes that inherited the mark: whatever Ray starts inherits its driver's environment."""
    ((name, value),) = mark.items()
    return [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(name) == value]
