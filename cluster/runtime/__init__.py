"""Runtime: an embedded local Ray or an existing cluster, and what a run needs of it."""

import logging
import os
import signal
import site
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import RayLost
from cluster.runtime.draining import draining
from cluster.runtime.embedded import embedded_ray
from cluster.runtime.existing import Existing, connected, first_line
from cluster.runtime.lifeline import Lifeline
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

DEATH_TIMEOUT_S = 10  # of an actor that is killed
MOST_CPUS = 1024  # logical ones of an embedded Ray: each is a process

# Ray reads these when it is imported or started. A user's own settings win.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # how soon Ray Train notices that a run has ended, 2 s by default; each look takes time from busy workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # how long a group of workers waits for its room before the room that there is is looked at anew, 60 s by default:
    # a node that has just died still counts as room, and whoever trains on MIN-MAX workers could go on with fewer
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # 5 s by default: a cloud's warning may come half a minute before
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of custom models keep their meaning
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Workers:
    """How many Ray workers a run wants, `least` to `most` of them, and what each holds."""

    least: int
    most: int
    cpus: int
    use_gpu: bool
    roles: int = 1  # actors that one replica of what is trained takes: 2 for a generator and a discriminator

    @property
    def replicas(self) -> int:
        """How many slices a global batch is cut into; 0 where it is trained in this process."""
        return self.most // self.roles

    @property
    def coordinated(self) -> bool:
        """Whether they play together, led from this process, rather than run the loop as equals under Ray Train."""
        return self.roles > 1

    @property
    def what(self) -> str:
        """In words: `3 workers`, or `2 pairs of halves, so 4 actors`."""
        if not self.coordinated:
            return f"{self.least} workers"
        return f"{self.replicas} pair{'s' * (self.replicas > 1)} of halves, so {self.most} actors"

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker reserves."""
        return {"CPU": self.cpus, "GPU": 1} if self.use_gpu else {"CPU": self.cpus}

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """As Ray Train takes it: a number, or a range for elastic runs."""
        return self.most if self.least == self.most else (self.least, self.most)


def parse_workers(text: str) -> tuple[int, int]:
    """`"4"` -> (4, 4), `"2-8"` -> (2, 8). Raises UserError."""
    least, dash, most = text.partition("-")
    try:
        bounds = int(least), int(most if dash else least)
    except ValueError:
        bounds = (-1, -1)
    if bounds[0] < 0 or bounds[1] < bounds[0] or (dash and bounds[0] == 0):
        raise UserError("--workers", f"{text!r} is not a number of workers", "give one like 2, or a range like 2-4")
    return bounds


def configure_ray() -> None:
    """Settle Ray's environment; must come before the first `import ray`."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


@dataclass
class RaySession:
    """A connection to Ray: the module, and whether it is an embedded one of our own, on this machine alone."""

    ray: Any
    embedded: bool
    folder: Path | None = None  # of an embedded one, for notes of its processes: it goes with them, whatever ends them
    placed: bool = False  # in a trial, whose placement group has room for a GAN's halves after its first bundle
    stored: Mapping[str, Any] | None = None  # tables that are in the object store already
    lifeline: Lifeline | None = None  # of the driver; other processes die with their raylet
    start: Callable[[], Lifeline] | None = None  # starts an embedded Ray anew
    starting: bool = False

    def lost(self) -> str | None:
        """Which process of Ray's has died without which nothing goes on, in words; None while all is well."""
        return self.lifeline.broken() if self.lifeline else None

    def refuse_lost(self) -> None:
        """Raise RayLost where Ray has gone."""
        if reason := self.lost():
            raise RayLost(reason)

    def drained(self) -> bool:
        """Whether the cluster is about to take this process's node away."""
        return not self.embedded and bool(draining([self.ray.get_runtime_context().get_node_id()]))

    def revive(self) -> None:
        """Start an embedded Ray anew where it has gone: all references into it are void then.

        Raises RayLost where it cannot be started, or is not ours.
        """
        reason = self.lost()
        if reason is None:
            return
        if self.start is None:
            raise RayLost(reason)
        logger.warning("%s; it is started anew", reason)
        self.starting = True
        try:
            self.lifeline = self.start()
        except Exception as error:  # whatever Ray raises where it does not come up
            raise RayLost(f"{reason}, and could not be started anew ({first_line(error)})") from None
        finally:
            self.starting = False

    def references(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """The tables in the object store, where they go once, whatever the number of workers and nodes."""
        if self.stored is not None:
            return dict(self.stored)
        return {split: self.ray.put(table) for split, table in tables.items()}

    def end(self, actor: Any) -> None:
        """Kill an actor on this process's node, and return once its process has gone, which may ask for room till then.

        It is waited for ten seconds at most.
        """
        from ray._private.state import actors

        pid, process = actors(actor._actor_id.hex()).get("Pid"), None
        with suppress(psutil.Error):
            process = psutil.Process(pid) if pid else None
        self.ray.kill(actor)
        with suppress(psutil.Error):
            if process is not None and process.name().startswith("ray::"):  # else it has ended
                process.wait(DEATH_TIMEOUT_S)

    def remove_orphaned_groups(self) -> set[bytes]:
        """Remove this job's placement groups that a process made which has died; Ray keeps them to the job's end.

        Returns the ids of living actors that have some.
        """
        from ray._private.state import actors, state  # the public table does not say who made a group
        from ray.core.generated.gcs_pb2 import PlacementGroupTableData
        from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

        job, nobody = self.ray.get_runtime_context().get_job_id(), self.ray.ActorID.nil().binary()
        living: set[bytes] = set()
        for serialised in state._connect_and_get_accessor().get_placement_group_table():
            group = PlacementGroupTableData.FromString(serialised)
            ours = group.creator_job_id.hex() == job and group.creator_actor_id != nobody and not group.is_detached
            if not ours or group.state == PlacementGroupTableData.REMOVED:
                continue
            # an actor may have asked for one in the moment in which it was killed: Ray then takes no note of its death
            creator = actors(group.creator_actor_id.hex())
            if group.creator_actor_dead or creator.get("State", "DEAD") == "DEAD":
                remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            else:
                living.add(group.creator_actor_id)
        return living


@contextmanager
def ray_session(*, address: Existing | None, cpus: int, verbose: bool) -> Iterator[RaySession]:
    """Connect to the cluster at `address`, or start an embedded one with `cpus` logical CPUs; leave it afterwards.

    A Ray that the caller has started already is used, and left running. Raises UserError where none answers.
    """
    configure_ray()
    if not address and cpus > MOST_CPUS:
        raise UserError(
            "--workers",
            f"{cpus:,} CPUs in all, on a Ray of this machine alone, which has {os.cpu_count()}",
            f"ask for {MOST_CPUS:,} at most, counting train.cpus_per_worker, or give a cluster's --address",
        )
    import ray

    if ray.is_initialized():
        yield RaySession(ray, embedded=False, lifeline=Lifeline(ray, embedded=False))
        return
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    options["job_config"] = _job_config()
    if not verbose:  # Ray Train's and Ray's own notes stay in Ray's files
        for name in ("ray", "ray.train", "ray.data", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        ray._private.worker.print_to_stdstream = lambda *_, **__: None  # a dead raylet's last log, on standard output
    session = RaySession(ray, embedded=address is None)
    with ExitStack() as current:

        def start() -> Lifeline:
            current.close()  # what is left of one that has died
            on_terminate = signal.getsignal(signal.SIGTERM)
            started = connected(ray, address, **options) if address else embedded_ray(ray, num_cpus=cpus, **options)
            session.folder = current.enter_context(started)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_terminate)  # Ray's own, which it has put in place, ends the process
            return Lifeline(ray, embedded=session.embedded)

        session.lifeline = start()
        session.start = start if session.embedded else None
        yield session


def _job_config() -> Any:
    """A job whose workers look for modules where this process does (see those who are given `sys.path`).

    Ray would put the current directory first: there a user's file may have the name of a library, or of a package here.
    """
    from ray.job_config import JobConfig

    class OwnPath(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True  # then Ray adds nothing

    packages = str(Path(__file__).parents[2])  # they come before all that is sent: not installed, they must be found
    installed = packages in (*site.getsitepackages(), site.getusersitepackages())
    on_path = packages in map(os.path.abspath, sys.path)
    return OwnPath(_py_driver_sys_path=[packages] if on_path and not installed else [])


def places(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many such bundles these nodes have room for when they are empty."""
    wanted = {name: amount for name, amount in bundle.items() if amount}
    return sum(min(int(node.get(name, 0) // amount) for name, amount in wanted.items()) for node in nodes)


def refuse_unplaceable(ray: Any, workers: Workers) -> None:
    """Raise UserError where the cluster, grown as far as it may, can never place the workers."""
    from ray._private.state import state  # the autoscaler's limits have no public way to be asked for

    limits = state.get_max_resources_from_cluster_config()
    if limits:  # an autoscaler will try; only its limits are fixed
        room = places(workers.bundle, [limits])
    else:
        room = places(workers.bundle, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if room < workers.least:
        each = " and ".join(f"{amount:g} {name}" for name, amount in workers.bundle.items())
        have = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        raise UserError(
            "--workers",
            f"{workers.what} of {each} each can never be placed: the cluster has {have['CPU']:g} CPU and "
            f"{have['GPU']:g} GPU, room for {room} of them",
            "ask for fewer workers, or for less with train.cpus_per_worker",
        )


def warn_about_cores(workers: Workers) -> None:
    """Say so where an embedded Ray is asked for more than the machine has: it runs, but slower than it could."""
    cores = os.cpu_count() or 1
    if workers.most * workers.cpus > cores:
        logger.warning("%d workers of %d CPU share the %d cores of this machine", workers.most, workers.cpus, cores)


def local_device(use_gpu: bool) -> Any:
    """The torch device of a run in this process. Raises UserError where a GPU is asked for and there is none."""
    import torch

    if use_gpu and not torch.cuda.is_available():
        raise UserError(
            "--gpu", "torch finds no GPU on this machine", "leave it out, or check the driver with nvidia-smi"
        )
    return torch.device("cuda" if use_gpu else "cpu")


def device_name(use_gpu: bool) -> str:
    """The device that this machine's processes train on, as environment.json has it."""
    import torch

    return torch.cuda.get_device_name() if use_gpu and torch.cuda.is_available() else "cpu"
