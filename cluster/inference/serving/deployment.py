"""Deployment: replicas of a served model under Ray Serve, which starts, watches, renews and stops them.

Each replica listens on the server's port itself (SO_REUSEPORT: the kernel deals connections out), beside the model that
answers. What waits while the model computes is answered in its next pass (serve.batch). Ray Serve's own proxy is off:
it hands each request from process to process: through it 16 clients got a quarter of the answers of a minimal FastAPI
server on two cores; this way they get more than its own (tests/benchmarks/serving.py).
"""

import asyncio
import ipaddress
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import uvicorn
from ray import serve
from ray.serve.schema import LoggingConfig

from cluster.errors import RunFailed
from cluster.inference.serving.app import Measures, site
from cluster.inference.serving.requests import Limits
from cluster.inference.serving.served import Answer, Rows, Served
from cluster.runtime import RaySession, local_device, ray_session
from cluster.runtime.existing import first_line
from cluster.runtime.lifeline import POLL_S
from cluster.storage import Folder
from nn_models.errors import UserError

NAME = "manta"
MOST_REQUESTS = 64  # that are answered in one pass
STOPPING_S = 15.0  # that requests which have begun may take
METRICS = "metrics"
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


@dataclass(frozen=True)
class Settings:
    """How a model is served; the same for all replicas, whatever run they serve."""

    host: str
    port: int
    replicas: int = 1
    use_gpu: bool = False
    token: str | None = None
    limits: Limits = field(default_factory=Limits)
    folder: str = ""  # that only this user can enter, for the replicas' shared counts and sockets
    path: tuple[str, ...] = ()  # sys.path of the driver: where custom models are


class Replica:
    """One process with the model and a server of its own on the common port."""

    served: Served

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        sys.path.extend(part for part in settings.path if part not in sys.path)
        _close_side_door(settings.folder)

    async def reconfigure(self, told: dict[str, Any]) -> None:
        """Serve this run from now on: what has begun is answered by the one before. Ray Serve calls it."""
        device = local_device(self._settings.use_gpu)
        self.served = await asyncio.to_thread(lambda: Served(told["run"], device=device))
        if self._server is None:
            self._measures = Measures()
            limits, token = self._settings.limits, self._settings.token
            config = uvicorn.Config(
                site(self, token=token, limits=limits, measures=self._measures),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(STOPPING_S) - 5,
            )
            self._server = uvicorn.Server(config)
            listening = _socket(self._settings.host, self._settings.port, shared=True)
            self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
            while not self._server.started:
                if self._serving.done():
                    await self._serving
                    raise RuntimeError("the server has ended")
                await asyncio.sleep(0.01)

    async def check_health(self) -> None:
        """Raise where the server has ended, so that Ray Serve starts another replica."""
        if self._serving is not None and self._serving.done():
            raise RuntimeError("the server has ended")

    async def answer(self, served: Served, rows: Rows) -> list[Answer] | UserError:
        """See Answering."""
        return await self._answered((served, rows))

    @serve.batch(max_batch_size=MOST_REQUESTS, batch_wait_timeout_s=0)
    async def _answered(self, given: list[tuple[Served, Rows]]) -> list[list[Answer] | UserError]:
        self._measures.batches.observe(sum(len(rows) for _, rows in given))
        return await asyncio.to_thread(_answers, given)  # the loop takes in more meanwhile

    async def swap(self, run: str) -> dict[str, Any]:
        """See Answering."""
        place = Folder(run).uri
        served = await asyncio.to_thread(Served, place)  # refuses what cannot be served, before any replica is told
        await asyncio.to_thread(deploy, self._settings, place)
        return served.described()

    async def __del__(self) -> None:
        """Answer what has begun, and take nothing more. Ray Serve calls it, and waits."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            with suppress(Exception):
                await self._serving


def _close_side_door(folder: str) -> None:
    """Let this replica's server for other deployments listen in the folder, where no other user can knock.

    It would listen on all of this machine's addresses, and unpickle what anybody sends. Nobody here asks it.
    """
    from ray.serve._private import replica

    add = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add(server, f"unix:{folder}/replica-{os.getpid()}")


def _check_loopback(port: int) -> None:
    """Raise RunFailed where another port than this is open to other machines: a Ray that is not as we know it."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            for socket_ in process.net_connections("inet"):
                if socket_.status != psutil.CONN_LISTEN or socket_.laddr.port == port:
                    continue
                address = ipaddress.ip_address(socket_.laddr.ip)
                if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
                    raise RunFailed(f"Ray Serve listens on {address}, not on loopback alone")


def _answers(given: list[tuple[Served, Rows]]) -> list[list[Answer] | UserError]:
    """Each by the model that has checked its rows: more than one while a new run is swapped in."""
    found: list[list[Answer] | UserError] = [[] for _ in given]
    for served in {id(served): served for served, _ in given}.values():
        places = [place for place, (other, _) in enumerate(given) if other is served]
        for place, answers in zip(places, served.answers([given[place][1] for place in places]), strict=True):
            found[place] = answers
    return found


def deploy(settings: Settings, run: str) -> None:
    """Have Ray Serve's replicas serve this run: start them, or tell those there are. Returns once all do."""
    actor: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(settings.use_gpu)}
    actor["runtime_env"] = {"env_vars": {MULTIPROCESS: f"{settings.folder}/{METRICS}"}}
    replicas = serve.deployment(Replica).options(
        name="replica",
        num_replicas=settings.replicas,
        ray_actor_options=actor,
        max_ongoing_requests=MOST_REQUESTS,
        user_config={"run": run},
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=STOPPING_S,
        logging_config=QUIET,
        # one code for all runs: else Ray Serve takes each deployment for new code, and starts new replicas
        version="1",
        _internal=True,
    )
    serve.run(replicas.bind(settings), name=NAME, route_prefix=None)


def serve_run(
    run: str, settings: Settings, *, verbose: bool = False, ready: Callable[[str, int], None] = lambda run, port: None
) -> None:
    """Serve a run's best model until this process is interrupted; what has begun is answered then.

    `ready` is told the run and the port once requests are answered; port 0 is one that the system chooses. Raises
    UserError for a run that cannot be served or a port that is in use, and RunFailed where Ray ends.
    """
    place = Folder(run).uri
    local_device(settings.use_gpu)
    Served(place)  # refuses what cannot be served
    with _held(settings.host, settings.port) as port, _ray(settings.replicas, verbose=verbose) as session:
        assert session.folder is not None
        (session.folder / METRICS).mkdir()
        settings = replace(settings, port=port, folder=str(session.folder), path=tuple(sys.path))
        try:
            if not verbose:
                logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="Disabled", logging_config=QUIET)
            try:
                deploy(settings, place)
            except RuntimeError as error:
                raise RunFailed(f"Ray Serve could not start the replicas ({first_line(error)})") from None
            _check_loopback(port)
            ready(place, port)
            while not (lost := session.lost()):
                time.sleep(POLL_S)
            raise RunFailed(lost)
        finally:
            if not session.lost():
                serve.shutdown()


@contextmanager
def _ray(replicas: int, *, verbose: bool) -> Iterator[RaySession]:
    with ray_session(address=None, cpus=replicas, verbose=verbose) as session:
        if not session.embedded:
            raise UserError("serve", "a Ray runs in this process already", "end it with ray.shutdown()")
        yield session


def _socket(host: str, port: int, *, shared: bool) -> socket.socket:
    """Bound; where it is `shared`, others of this user's may be bound to the same port. Raises OSError."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # those that were closed linger for a minute
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


@contextmanager
def _held(host: str, port: int) -> Iterator[int]:
    """Keep the port for the replicas. Raises UserError where it cannot be had."""
    try:
        _socket(host, port, shared=False).close()  # nobody else has it, nor shares it
        held = _socket(host, port, shared=True)
    except OSError as error:
        path, fix = ("--host", "give an address of this machine") if port == 0 else ("--port", "choose another")
        raise UserError(path, f"{host}:{port} cannot be had ({error.strerror or error})", fix) from None
    with held:
        yield held.getsockname()[1]
