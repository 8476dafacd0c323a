"""Runs `fit` in several processes over gloo, without Ray: `python -m tests.unit.ranks JOBS`.

JOBS is a JSON list of {"recipe", "run", "world_size"}; world size 0 is a LocalContext. Where a job says "dies_at", all
its ranks are killed in that step; "class" is a class of recipes of its own, as module:name. Prints the exit codes of
each job's ranks. All jobs are forked from one process, so that torch and Ray are imported once.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from cluster.data.prepare import prepared
from cluster.group import join, leave
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.context import GroupContext, LocalContext
from cluster.training.journal import Journal
from cluster.training.loop import fit
from cluster.training.splits import open_splits


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(sys.argv[1])
    # imports what torch imports when it is used
    _fit(jobs[0] | {"run": tempfile.mkdtemp(), "world_size": 0, "dies_at": None}, 0)
    print(json.dumps([forked(partial(_fit, job), world_size=job["world_size"]) for job in jobs]))


def forked(work: Callable[[int], None], *, world_size: int) -> list[int]:
    """The exit codes of `work(rank)` in as many processes, which are a gloo group; 0 is one process without a group.

    Of a process that was killed it is the number of the signal, 9.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [_fork(work, rank, world_size, store) for rank in range(max(1, world_size))]
        return [abs(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])) for process in processes]


def _fork(work: Callable[[int], None], rank: int, world_size: int, store: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with warnings.catch_warnings():
            # torch 2.15 advises an argument that torch 2.11 does not know
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            if world_size:
                join(f"file://{store}", rank, world_size=world_size, timeout_s=120)
            work(rank)
            if world_size:
                leave()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _recipe(job: dict) -> Recipe:
    if "class" not in job:
        return load_recipe(job["recipe"])
    module, name = job["class"].split(":")
    return getattr(import_module(module), name).model_validate(job["recipe"])


def _die_at(step: int) -> None:
    whole = Journal.stepped

    def stepped(journal: Journal, *steps: int) -> None:
        if journal.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(journal, *steps)

    Journal.stepped = stepped


def _fit(job: dict, rank: int) -> None:
    recipe = _recipe(job)
    if job.get("dies_at"):
        _die_at(job["dies_at"])
    splits = open_splits(prepared(recipe.data), window=recipe.data.shuffle_window)
    place = {"run": Folder(job["run"]), "splits": splits, "device": torch.device("cpu")}
    result = fit(recipe, context=GroupContext(**place) if job["world_size"] else LocalContext(**place))
    if job["world_size"] and rank == 0:
        (Path(job["run"]) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
