"""Ray Train: the same loop in every worker, its Context over torch.distributed."""

import logging
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import ray
import torch
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from cluster.errors import Diverged, Lost, RayLost, RunFailed, StorageFailed
from cluster.group import COLLECTIVE_TIMEOUT_S, join, leave, listen_at, lost_peer
from cluster.recipe.loading import RECIPE
from cluster.recipe.recipe import Recipe
from cluster.runtime import RaySession, Workers
from cluster.runtime.draining import DRIVER
from cluster.runtime.lifeline import POLL_S
from cluster.storage import Folder
from cluster.training.context import GroupContext
from cluster.training.leaving import Leaving, Left
from cluster.training.loop import fit
from cluster.training.notes import FAILURE, STARTS, WAITED, Notes
from cluster.training.notice import LEAVING, heard, heed_sigterm
from cluster.training.splits import Splits
from cluster.training.starting import PATIENCE_S, Patient, TrainController
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 30
DEATH_TIMEOUT_S = 10  # of workers whose controller has died
TOLD_S = 300  # between two lines about room that is waited for
KNOWN: dict[str, type[RunFailed]] = {
    kind.__name__: kind for kind in (Diverged, StorageFailed, RunFailed)
}  # the message says all


@dataclass
class NodesConfig(TorchConfig):
    """Ray's own process group of workers, which listens at its nodes' addresses: see `listen_at`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See TorchConfig."""
        return _NodesBackend


class _NodesBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """See Backend."""
        worker_group.execute(_at_start)
        super().on_start(worker_group, backend_config)


def _at_start() -> None:
    heed_sigterm()
    listen_at(ray.util.get_node_ip_address())


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
        worker_group.execute(heed_sigterm)
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
    """Run the loop in Ray workers and return what rank 0's `fit` returned, with `restarts` and `preemptions`.

    Workers that die are started again, up to the recipe's max_failures times, from the newest checkpoint; so is all
    where Ray Train's controller dies, and with it an embedded Ray whose raylet or GCS does. Workers that are warned
    before (see notice) stop at a checkpoint and are started elsewhere, as often as that is so.
    Raises Diverged, UserError or RunFailed with what happened in the workers; RayLost where Ray has gone for good, or
    takes this process along.
    """
    began, restarts, preemptions, allowed = time.time(), 0, 0, recipe.train.max_failures
    while True:
        session.revive()
        again = {"began": began, "again": restarts + preemptions > 0}
        left = allowed - restarts
        with closing(_Attempt(recipe, splits, run, workers, session, max_failures=left, again=again)) as attempt:
            try:
                result = attempt.result()
                restarts += attempt.starts - 1
                break
            except AttemptMoves as moves:
                preemptions += 1
                restarts += attempt.starts - 1
                if session.drained():
                    raise RayLost(str(moves)) from None
                logger.warning("%s; the workers start again elsewhere", moves)
            except AttemptLost as lost:
                restarts += attempt.starts
                if restarts > allowed:
                    raise RunFailed(f"{lost}, more often than train.max_failures allows ({allowed})") from None
                logger.warning("%s; the workers are started again from the newest checkpoint", lost)
    if restarts or preemptions:
        told = "%d restarts after a death and %d moves after a warning have cost %.1f s"
        logger.info(told, restarts, preemptions, result["lost_s"])
    return {**result, "restarts": restarts, "preemptions": preemptions}


class AttemptLost(Exception):
    """What led the workers has died, and they with it."""


class AttemptMoves(Exception):
    """The workers were warned, and have stopped at a checkpoint."""


class _Attempt:
    """One controller of Ray Train's with its workers, which it may start several times. `close` must be called."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        run: Folder,
        workers: Workers,
        session: RaySession,
        *,
        max_failures: int,
        again: dict[str, Any],
    ) -> None:
        self._session = session
        key = uuid.uuid4().hex
        self._notes = Notes(key)
        # Ray Train keeps an account of its controller there; the run's own state is in the run's directory.
        self._run, self._account = run, run.uri
        if session.embedded:
            self._account = tempfile.mkdtemp(prefix="manta-", dir=session.folder)
        group: TorchConfig = NodesConfig(timeout_s=COLLECTIVE_TIMEOUT_S)
        if session.embedded:
            backend = "nccl" if workers.use_gpu else "gloo"
            group = LoopbackConfig(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_S, meeting=self._account)
        self._trainer = _Trainer(
            _work,
            train_loop_config={
                "recipe": recipe.model_dump(mode="json"),
                "splits": replace(splits, tables={}),
                "tables": session.references(splits.tables),
                "run": run.uri,
                "notes": key,
                **again,
                "path": sys.path,
                "threads": workers.cpus,
            },
            torch_config=group,
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=workers.bundle
            ),
            run_config=RunConfig(
                name=".ray",
                storage_path=self._account,
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=3),
            ),
        )
        self._trainer.session, self._trainer.look, self._trainer.notes = session, self._look, key
        self._workers, self._told_at_s = workers, float("-inf")

    def result(self) -> dict[str, Any]:
        """What rank 0's `fit` returned. Raises as train_on_ray does, and AttemptLost."""
        try:
            returned = self._trainer.fit().return_value
        except _ToldFailure as told:
            returned = {"failure": told.failure}
        except TrainingFailedError as error:
            raise RunFailed(_explain(error)) from None
        except ray.exceptions.RayError as error:  # ended from another thread, or by what befell Ray
            if self._trainer.aborted:
                raise RunFailed("the run was ended") from None
            raise AttemptLost(self._session.lost() or _death(error)) from None
        except RayLost as lost:
            raise AttemptLost(str(lost)) from None
        if "failure" in returned:
            _raise(returned["failure"])
        if "moves" in returned:
            raise AttemptMoves(returned["moves"])
        found: dict[str, Any] = returned["result"]
        return found

    @cached_property
    def starts(self) -> int:
        """How often the workers were started, as far as that is known: once at least."""
        return 1 if self._session.lost() else self._notes.read(STARTS) or 1

    def _look(self) -> None:
        """Called every moment while the workers train."""
        self._session.refuse_lost()
        if self._session.drained():
            self._notes.write(LEAVING, DRIVER)
        if failure := self._notes.read(FAILURE):
            raise _ToldFailure(failure)
        self._tell_of_waiting(self._notes.read(WAITED) or 0.0)

    def _tell_of_waiting(self, waited_s: float) -> None:
        if not waited_s:  # not yet for long
            self._told_at_s = float("-inf")
        elif waited_s > self._told_at_s + TOLD_S:
            self._told_at_s = waited_s
            each = " and ".join(f"{amount:g} {name}" for name, amount in self._workers.bundle.items())
            logger.warning("the cluster has no room now for %s of %s each: waiting for it", self._workers.what, each)

    def close(self) -> None:
        """Remove what is left of the attempt, and return once others can have its room."""
        if self._session.lost() is None:
            self._notes.clear()
            controller = self._trainer.controller
            until = time.monotonic() + DEATH_TIMEOUT_S
            while (living := self._session.remove_orphaned_groups()) and time.monotonic() < until:
                if controller is None or controller._actor_id.binary() not in living:
                    break
                time.sleep(0.1)
        if self._session.embedded:
            shutil.rmtree(self._account, ignore_errors=True)
        else:
            with suppress(Lost):  # told already
                self._run.delete(".ray")


class _ToldFailure(Exception):
    def __init__(self, failure: dict[str, Any]) -> None:
        super().__init__(failure)
        self.failure = failure


class _Trainer(TorchTrainer):
    """Keeps its controller at hand: to end it for certain, and to end a run from another thread."""

    controller: Any = None
    aborted = False
    session: RaySession
    look: Callable[[], None]  # raises what ends the training
    notes: str

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's own removal of a dead controller's placement group is a process for each run, asks the dashboard, and
        # goes on for ever where there is none. See RaySession.remove_orphaned_groups.
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        """As Ray's own, but that it looks about while it waits, and that no handler of SIGINT ends the process."""
        environment = get_env_vars_to_propagate()
        environment.setdefault(
            RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE
        )
        if self.session.embedded:  # nobody takes a node of it away: no process is needed to watch for that
            environment[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        remote = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})(TrainController)
        patient = Patient(self.run_config.failure_config, self.notes)
        self.controller = remote.remote(**{**options, "failure_policy": patient})
        _running.append(self)
        try:
            self._watched(self.controller.run.remote())
            return self._watched(self.controller.get_result.remote())
        finally:
            _running.remove(self)
            if self.session.lost() is None:  # else it has gone as well, and nobody answers
                self.session.end(self.controller)  # some stay behind otherwise, waiting for a lock while they exit

    def _watched(self, call: Any) -> Any:
        done: list[Any] = []
        while not done:
            self.look()
            done, _ = ray.wait([call], timeout=POLL_S, fetch_local=False)
        return ray.get(call)


_running: list[_Trainer] = []


def abort_runs() -> None:
    """End the runs of this process from another thread: their workers, and the placement groups they hold."""
    for trainer in list(_running):
        trainer.aborted = True
        with suppress(ray.exceptions.RayError):  # it ends itself while it is asked
            ray.get(trainer.controller.abort.remote(), timeout=ABORT_TIMEOUT_S)


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker does: the loop, or to hand on the failure that a start before this one ended with."""
    sys.path.extend(path for path in config["path"] if path not in sys.path)
    torch.set_num_threads(config["threads"])
    notes = Notes(config["notes"])
    if failure := notes.read(FAILURE):  # it would only happen again
        return {"failure": failure}
    tables = dict(zip(config["tables"], ray.get(list(config["tables"].values())), strict=True))
    splits = replace(config["splits"], tables=tables)
    leaving = Leaving()
    run, device = Folder(config["run"]).anchored(), get_device()
    context = GroupContext(run=run, splits=splits, device=device, leaves=leaving.leaves)
    if context.rank == 0:
        notes.write(STARTS, 1 + (notes.read(STARTS) or 0))
        notes.write(LEAVING, None)  # of workers before these, which came to no end in time
    start = context.share(notes.read(STARTS))  # from here on these ranks listen
    since = config["began"] if config["again"] or start > 1 else None
    place = {"rank": context.rank, "world_size": context.world_size}
    alone = ExitStack()
    try:
        if run.local and not run.exists(RECIPE):  # a node that came after all others were asked
            where = f"{run} is not there on node {ray.util.get_node_ip_address()}"
            raise UserError("--run", where, "give --run a URI or a folder that all nodes share")
        if context.rank == 0 and context.run.local:  # workers whose controller has died may live on a little, and write
            alone.enter_context((context.run / "checkpoints").create().claimed(patience_s=DEATH_TIMEOUT_S))
        with heard(leaving, notes, group=f"group {start}", **place):
            return {"result": fit(Recipe.model_validate(config["recipe"]), context=context, since=since)}
    except Left as left:
        return {"moves": f"{notes.read(LEAVING)}: {left}"}
    except Diverged as error:  # all ranks are here
        return {"failure": _described(error)}
    except Exception as error:
        if isinstance(error, (UserError, RunFailed)) or not lost_peer(error):  # else Ray starts all again
            notes.write(FAILURE, _described(error))
        raise
    finally:
        alone.close()


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
    if failure["kind"] in KNOWN:
        raise KNOWN[failure["kind"]](failure["message"])
    raise RunFailed(f"{failure['kind']}: {failure['message']}\n{failure['traceback']}")


def _death(error: Exception) -> str:
    """How the controller's death is told."""
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "the process of Ray Train's controller has died"
    lines = str(error).strip().splitlines()
    return f"Ray Train's controller has failed ({type(error).__name__}{': ' * bool(lines)}{''.join(lines[:1])})"


def _explain(error: TrainingFailedError) -> str:
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return f"the cluster has had no room for the workers for {PATIENCE_S / 60:.0f} minutes"
    failures = getattr(error, "worker_failures", {})
    ranks = "; ".join(
        f"worker {rank}: {str(inner).strip().splitlines()[-1]}" for rank, inner in sorted(failures.items())
    )
    return f"the workers failed more often than train.max_failures allows ({ranks or error})"
