"""Client: a cluster's job server, with the user's token; what it refuses or cannot do is told in one message."""

import ipaddress
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from cluster.errors import Lost, RunFailed
from cluster.runtime import configure_ray, places
from cluster.runtime.embedded import environment
from cluster.runtime.existing import RAY_ADDRESS, first_line, has_token, token_mode
from nn_models.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

SERVER_ADDRESS = "RAY_API_SERVER_ADDRESS"
ANSWER_S = 15.0
BEGIN_S = 60.0  # of a job, whose node may be busy
UPLOAD_S = 600.0
TOKEN_FIX = (
    "copy the head node's ~/.ray/auth_token (`ray get-auth-token` there) to this machine's, or set RAY_AUTH_TOKEN or "
    "RAY_AUTH_TOKEN_PATH"
)
RAYS_NOTES = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
NODE_GROUP = "ray.io/node-group"  # a label that `ray up` and KubeRay give to nodes
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class ServerLost(Lost):
    """The job server no longer answers; the job may go on."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    address: str
    raylet_socket: str
    resources: dict[str, float]
    group: str | None = None  # its type's name in the file of `ray up` or KubeRay; None where it was started by hand

    @property
    def here(self) -> bool:
        """Whether it is this machine: through a tunnel, another one may well have the same address."""
        mine = {found.address for of_one in psutil.net_if_addrs().values() for found in of_one}
        return self.address in mine and Path(self.raylet_socket).exists()


@dataclass(frozen=True)
class Job:
    """What the job server says of a job. Times are seconds since 1970."""

    id: str
    status: str  # PENDING, RUNNING or one of ENDED
    message: str
    exit_code: int | None
    began: float | None
    ended: float | None
    metadata: dict[str, str]
    entrypoint: str

    @property
    def over(self) -> bool:
        """Whether it has its final status."""
        return self.status in ENDED

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


class JobServer:
    """The job server at http://HOST:PORT."""

    def __init__(self, address: str | None) -> None:
        """By default that of RAY_API_SERVER_ADDRESS, or of RAY_ADDRESS where that is one.

        Raises UserError where none answers, or it refuses the token that is here.
        """
        self.url = _url(address)
        _warn_of_plain_http(self.url)
        configure_ray()
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            """Ray's own waits for answers without end; the only place that all its requests go through is this one."""

            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                patience_s = {"PUT": UPLOAD_S, "POST": BEGIN_S}.get(method, ANSWER_S)
                return super()._do_request(method, endpoint, **{"timeout": patience_s, **options})

        for name in RAYS_NOTES:
            logging.getLogger(name).setLevel(logging.ERROR)
        # Ray prefers both of these variables to the address that is given
        with environment({SERVER_ADDRESS: self.url, **token_mode()}), self._answering():
            self.client = Client(self.url)

    @contextmanager
    def _answering(self, job: str | None = None) -> Iterator[None]:
        """Raise what goes wrong in the block as UserError, ServerLost or RunFailed."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise self._refused() from None
        except (requests.RequestException, ConnectionError) as error:
            if hasattr(self, "client"):
                raise ServerLost(f"the job server at {self.url} does not answer ({type(error).__name__})") from None
            raise self._no_server() from None
        except RuntimeError as error:
            told = str(error)
            if job and "status code 404" in told:
                raise UserError(
                    job, f"no such job on the cluster at {self.url}", "`manta jobs list` lists them"
                ) from None
            if not hasattr(self, "client"):
                raise self._no_server() from None
            raise RunFailed(f"the job server at {self.url}: {_reason(told)}") from None
        except (ValueError, TypeError) as error:  # no JSON: something else listens there; or no runtime_env
            if not hasattr(self, "client"):
                raise self._no_server() from None
            raise UserError(
                "--runtime-env", first_line(error), "see Ray's documentation of runtime environments"
            ) from None

    def _refused(self) -> UserError:
        what, fix = "that is not the one here", TOKEN_FIX
        if os.environ.get("RAY_AUTH_MODE", "token") != "token":
            what, fix = "and RAY_AUTH_MODE keeps it from being sent", "unset RAY_AUTH_MODE"
        elif not has_token():
            what = "and there is none here"
        return UserError("--address", f"{self.url}: this cluster wants a token {what}", fix)

    def _no_server(self) -> UserError:
        return UserError(
            "--address",
            f"{self.url}: no job server of a Ray cluster answers there",
            "give http://HOST:8265 of the head node; where that is not public, `ssh -L 8265:localhost:8265 HEAD` first",
        )

    # -- jobs ------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """All that were submitted, the newest first."""
        with self._answering():
            found = [_job(details) for details in self.client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: -(job.began or 0))

    def job(self, job: str) -> Job:
        """The job with this id. Raises UserError where there is none."""
        refuse_id(job, job)
        with self._answering(job):
            return _job(self.client.get_job_info(job))

    def log(self, job: str, *, missing_ok: bool = False) -> str:
        """All that it has written so far; with `missing_ok` nothing where the node that has it has gone."""
        refuse_id(job, job)
        try:
            with self._answering(job):
                return str(self.client.get_job_logs(job))
        except RunFailed as error:
            if isinstance(error, ServerLost) or not missing_ok:
                raise
            return ""

    def stop(self, job: str) -> bool:
        """Ask it to end; whether it was running."""
        refuse_id(job, job)
        with self._answering(job):
            return bool(self.client.stop_job(job))

    def submit(self, job: str, entrypoint: str, runtime_env: Mapping[str, Any], **options: Any) -> None:
        """Upload what the runtime_env names and start the job with this id. Logs what Ray takes no notice of."""
        from ray.runtime_env import RuntimeEnv

        for field in runtime_env:
            if field not in RuntimeEnv.known_fields:
                meant = did_you_mean(field, RuntimeEnv.known_fields)
                logger.warning("--runtime-env: %s: no field of Ray's own; %s", field, meant)
        try:
            with self._answering():
                self.client.submit_job(
                    submission_id=job, entrypoint=entrypoint, runtime_env=dict(runtime_env), **options
                )
        except ServerLost as error:
            raise ServerLost(f"{error}; whether it has begun says `manta jobs status {job}`") from None
        except RunFailed as error:
            if "already been used" in str(error) or "already exists" in str(error):
                raise UserError("--job-id", f"{job} is taken", "choose another") from None
            raise

    def upload_zip(self, file: Path) -> str:
        """Upload an archive, unless it is there. Returns its URI in the cluster."""
        with self._answering():
            return str(self.client._upload_package_if_needed(str(file), include_gitignore=False, is_file=True))

    # -- the cluster -----------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """The living nodes."""
        totals = self._get("/api/v0/nodes?detail=1&limit=10000")["result"]["result"]
        sockets = {
            node["raylet"].get("nodeId"): node["raylet"].get("rayletSocketName", "")
            for node in self._get("/nodes?view=summary")["summary"]
        }
        return [
            Node(
                node["node_ip"],
                sockets.get(node["node_id"], ""),
                node.get("resources_total") or {},
                (node.get("labels") or {}).get(NODE_GROUP),
            )
            for node in totals
            if node["state"] == "ALIVE"
        ]

    def grows(self) -> bool:
        """Whether an autoscaler may add nodes. Ray's own, by default, tells the job server nothing: its nodes do."""
        return any(node.group for node in self.nodes())

    def refuse_unplaceable(self, bundles: list[dict[str, float]], what: str) -> None:
        """Raise UserError where the cluster can never have room for all of these at once; one that grows may."""
        wanted = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
        nodes = [node.resources for node in self.nodes()]
        alike = {tuple(sorted(bundle.items())) for bundle in wanted}
        short = [
            each for each in alike if places(dict(each), nodes) < sum(sorted(b.items()) == list(each) for b in wanted)
        ]
        if short and not self.grows():
            have = {name: sum(node.get(name, 0) for node in nodes) for name in dict(short[0])}
            told = " and ".join(f"{amount:g} {name}" for name, amount in have.items())
            raise UserError(
                "--workers",
                f"{what} can never be placed: the cluster at {self.url} has {told} on {len(nodes)} "
                f"node{'s' * (len(nodes) != 1)}",
                "ask for fewer workers, or for less with train.cpus_per_worker",
            )

    def _get(self, path: str) -> Any:
        with self._answering():
            response = self.client._do_request("GET", path)
            response.raise_for_status()
            return response.json()["data"]


def refuse_id(job: str, path: str) -> None:
    """Raise UserError, of this path, for an id that no job can have: it stands in addresses and names of files."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", job):
        raise UserError(path, f"{job!r} is no id of a job", "give letters, digits, and . _ - between them")


def _url(address: str | None) -> str:
    of_ray = os.environ.get(RAY_ADDRESS, "")
    found = address or os.environ.get(SERVER_ADDRESS) or (of_ray if of_ray.startswith("http") else "")
    if not found:
        raise UserError(
            "--address", "no job server is named", f"give http://HOST:8265 of the head node, or set {SERVER_ADDRESS}"
        )
    url = found if "://" in found else f"http://{found}"
    parts = urlsplit(url)
    try:
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is none
        fine = False
    if not fine:
        raise UserError("--address", f"{found} is not that of a job server", "give http://HOST:8265 of the head node")
    return url.rstrip("/")


def _warn_of_plain_http(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "http" and has_token() and not _is_loopback(parts.hostname or ""):
        logger.warning(
            "--address: to %s the token, and all else, goes where others can read it; use https, or go through "
            "`ssh -L 8265:localhost:8265 HEAD`",
            url,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        began=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        metadata=dict(details.metadata or {}),
        entrypoint=details.entrypoint,
    )


def _reason(told: str) -> str:
    """The last line of a server's traceback, which Ray ends with a full stop of its own."""
    lines = [line.strip() for line in told.splitlines() if any(map(str.isalnum, line))]
    return lines[-1] if lines else "it gave no reason"
