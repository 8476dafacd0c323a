"""Ray Train: the same loop in every worker, its Context over torch.distributed."""

import shutil
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api import data_parallel_trainer as internals

from cluster.errors import Diverged, RunFailed
from cluster.group import COLLECTIVE_TIMEOUT_S, join, leave, lost_peer
from cluster.recipe.recipe import Recipe
from cluster.runtime import RaySession, Workers
from cluster.storage import Folder
from cluster.training.context import GroupContext
from cluster.training.loop import fit
from cluster.training.splits import Splits
from nn_models.errors import UserError

STARTS = ".starts.json"  # how often the workers were started
FAILURE = ".failure.json"  # an error that would only come again
ABORT_TIMEOUT_S = 30


@dataclass
class LoopbackConfig(TorchConfig):
    """A process group of workers on one machine that listens on no network.

    `meeting` is a directory of the caller's for the file through which the workers find each other; Ray's own
    TorchConfig meets through a TCP store on all interfaces, which anyone who reaches it may write to.
    """

    meeting: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        """See TorchConfig."""
        return _LoopbackBackend


class _LoopbackBackend(Backend):
    share_cuda_visible_devices = True  # as with TorchConfig's: NCCL's peers must see each other's GPUs

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """See Backend. A file is where the workers meet: a new one for each start."""
        meeting = f"file://{Path(tempfile.mkdtemp(dir=backend_config.meeting)) / 'store'}"
        timeout_s, backend = backend_config.timeout_s, backend_config.backend
        shared = {"world_size": len(worker_group), "timeout_s": timeout_s, "backend": backend}
        ray.get(
            [
                worker_group.execute_single_async(rank, join, meeting, rank, **shared)
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """See Backend."""
        worker_group.execute_async(leave)


def train_on_ray(
    recipe: Recipe, splits: Splits, *, run: Folder, workers: Workers, session: RaySession
) -> dict[str, Any]:
    """Run the loop in Ray workers and return what rank 0's `fit` returned, with the number of `restarts`.

    Workers that die are started again, up to the recipe's max_failures times, from the newest checkpoint.
    Raises Diverged, UserError or RunFailed with what happened in the workers.
    """
    for name in (STARTS, FAILURE):
        run.delete(name)
    # Ray Train keeps notes about its controller there; the run's own state is in the run's directory.
    notes = tempfile.mkdtemp(prefix="manta-", dir=session.folder) if session.embedded else run.uri
    group = TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S)
    if session.embedded:
        backend = "nccl" if workers.use_gpu else "gloo"
        group = LoopbackConfig(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_S, meeting=notes)
    trainer = _Trainer(
        _work,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "splits": replace(splits, tables={}),
            "tables": session.references(splits.tables),
            "run": run.uri,
            "path": sys.path,
            "threads": workers.cpus,
        },
        torch_config=group,
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=workers.bundle
        ),
        run_config=RunConfig(
            name=".ray",
            storage_path=notes,
            failure_config=FailureConfig(max_failures=recipe.train.max_failures, controller_failure_limit=3),
        ),
    )
    try:
        returned = trainer.fit().return_value
    except TrainingFailedError as error:
        if run.exists(FAILURE):
            returned = {"failure": run.read_json(FAILURE)}
        else:
            raise RunFailed(_explain(error)) from None
    finally:
        starts = run.read_json(STARTS) if run.exists(STARTS) else 1
        for name in (STARTS, FAILURE, ".ray"):
            run.delete(name)
        if session.embedded:
            shutil.rmtree(notes, ignore_errors=True)
        session.remove_orphaned_groups()  # last: it fails where Ray has gone
    if "failure" in returned:
        _raise(returned["failure"])
    return {**returned["result"], "restarts": starts - 1}


class _Trainer(TorchTrainer):
    """Keeps its controller at hand: to end it for certain, and to end a run from another thread."""

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's own removal of a dead controller's placement group is a process for each run, asks the dashboard, and
        # goes on for ever where there is none. See RaySession.remove_orphaned_groups.
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        # Ray shows its controller only where it may set a signal handler, so never in a trial's thread.
        theirs, internals.threading = internals.threading, _EVERY_THREAD_IS_MAIN
        try:
            _running.append(self)
            return super()._initialize_and_run_controller(**options)
        finally:
            internals.threading = theirs
            _running.remove(self)
            if self.controller is not None:
                ray.kill(self.controller)  # some stay behind otherwise, waiting for a lock while they exit

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's handler ends the process with exit code 0; KeyboardInterrupt must reach the caller instead."""
        self.controller = controller
        internals.threading = threading


_EVERY_THREAD_IS_MAIN: Any = SimpleNamespace(current_thread=lambda: None, main_thread=lambda: None)
_running: list[_Trainer] = []


def abort_runs() -> None:
    """End the runs of this process from another thread: their workers, and the placement groups they hold."""
    for trainer in list(_running):
        if trainer.controller is not None:
            with suppress(ray.exceptions.RayError):  # it ends itself while it is asked
                ray.get(trainer.controller.abort.remote(), timeout=ABORT_TIMEOUT_S)


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker does: the loop, or to hand on the failure that a start before this one ended with."""
    sys.path.extend(path for path in config["path"] if path not in sys.path)
    torch.set_num_threads(config["threads"])
    run = Folder(config["run"])
    if run.exists(FAILURE):  # it would only happen again
        return {"failure": run.read_json(FAILURE)}
    tables = dict(zip(config["tables"], ray.get(list(config["tables"].values())), strict=True))
    context = GroupContext(run=run, splits=replace(config["splits"], tables=tables), device=get_device())
    if context.rank == 0:
        run.write_json(STARTS, 1 + (run.read_json(STARTS) if run.exists(STARTS) else 0))
    try:
        return {"result": fit(Recipe.model_validate(config["recipe"]), context=context)}
    except Diverged as error:  # all ranks are here
        return {"failure": _described(error)}
    except Exception as error:
        if isinstance(error, (UserError, RunFailed)) or not lost_peer(error):  # else Ray starts all again
            run.write_json(FAILURE, _described(error))
        raise


def _described(error: Exception) -> dict[str, Any]:
    problems = error.plain() if isinstance(error, UserError) else []
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "problems": problems,
        "traceback": traceback.format_exc(),
    }


def _raise(failure: dict[str, Any]) -> NoReturn:
    if failure["problems"]:
        raise UserError.from_plain(failure["problems"])
    if failure["kind"] == "Diverged":
        raise Diverged(failure["message"])
    raise RunFailed(f"{failure['kind']}: {failure['message']}\n{failure['traceback']}")


def _explain(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", {})
    ranks = "; ".join(
        f"worker {rank}: {str(inner).strip().splitlines()[-1]}" for rank, inner in sorted(failures.items())
    )
    return f"the workers failed more often than train.max_failures allows ({ranks or error})"
