"""Existing: a Ray cluster that is there already: which one is meant, its token, and being a driver of it."""

import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.runtime.embedded import environment
from cluster.storage import Folder
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

ANSWER_S = 5
STORAGE = "MANTA_STORAGE"  # the folder or URI that runs go to where nobody says --run
RAY_ADDRESS = "RAY_ADDRESS"
JOB_SETTINGS = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's job server sets it for what it runs


@dataclass(frozen=True)
class Existing:
    """Where a cluster is, HOST:PORT or `auto`, and which option or variable says so."""

    where: str
    named_by: str

    def __str__(self) -> str:
        job = submitted_job()
        return f"the Ray cluster at {self.where} ({self.named_by}{f', in the job {job}' if job else ''})"


def existing(address: str | None, *, wanted: bool = True) -> Existing | None:
    """The cluster that `address` names or else RAY_ADDRESS, which Ray sets inside a job; None where there is none.

    It is logged, also where it is not `wanted`: then that of the environment is not used. None, too, where this process
    is connected already: a Ray that the caller has started is used as it is. Raises UserError for an address that no
    driver can use, that is given in vain, or where nothing answers.
    """
    found = Existing(address, "--address") if address else _of_environment()
    if found is None:
        return None
    if not wanted and address:
        raise UserError("--address", "training with --workers 0 uses no cluster", "give --workers 1 or more")
    if not wanted:
        logger.info("training in this process (--workers 0): %s is not used", found)
        return None
    scheme, separator, _ = found.where.partition("://")
    if separator:
        what = "the Ray client" if scheme == "ray" else "a job server"
        fix = "give the HOST:PORT of Ray itself on a node of the cluster, or use `manta submit` from elsewhere"
        raise UserError(found.named_by, f"{found.where}: {what} cannot drive training", fix)
    knock(found)
    logger.info("using %s", found)
    return found


def _of_environment() -> Existing | None:
    where = os.environ.get(RAY_ADDRESS, "")
    if where in ("", "local") or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return None
    return Existing(where, RAY_ADDRESS)


def submitted_job() -> str | None:
    """The id of the Ray job that this process runs in; None outside of one."""
    try:
        metadata = json.loads(os.environ.get(JOB_SETTINGS, "{}")).get("metadata") or {}
    except ValueError:
        return None
    return metadata.get("job_submission_id")


def refuse_temporary(folder: Folder, option: str = "--run") -> None:
    """Raise UserError for a directory in Ray's temporary folder, such as the one that a submitted job starts in."""
    local = folder.local
    above = [] if local is None else [local, *local.parents]
    if any(place.name.startswith("session_") and (place / "runtime_resources").is_dir() for place in above):
        raise UserError(
            option,
            f"{local} lies in Ray's temporary folder, which goes with the cluster",
            f"give {option} a folder or URI that stays and that all nodes reach, or set {STORAGE} to one",
        )


# -- a driver of it --------------------------------------------------------------------------------------------------


@contextmanager
def connected(ray: Any, found: Existing, **options: Any) -> Iterator[None]:
    """Be a driver of the cluster there, which may want the token that is here. Raises UserError where none can be."""
    knock(found)
    with environment(token_mode()):
        try:
            _refuse_elsewhere(found)
            ray.init(address=found.where, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise _not_connected(found, error) from None
        try:
            yield
        finally:
            ray.shutdown()


def _not_connected(found: Existing, error: Exception) -> UserError:
    told = f"{error} {error.__cause__ or error.__context__ or ''}"
    if any(word in told for word in ("AuthToken", "authentication", "Unauthenticated", "UNAUTHENTICATED")):
        return UserError(
            found.named_by,
            f"{found.where}: this cluster wants a token that is not the one here",
            "copy the head node's ~/.ray/auth_token to this machine's, or set RAY_AUTH_TOKEN",
        )
    fix = "" if found.named_by == "--address" else f"start one there, or unset {RAY_ADDRESS}"
    return UserError(found.named_by, f"{found.where}: no Ray cluster answers there ({first_line(error)})", fix)


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def knock(found: Existing) -> None:
    """Raise UserError where nothing listens at HOST:PORT: Ray itself would try for minutes, and then exit."""
    host, colon, port = found.where.rpartition(":")
    if not colon:
        return  # "auto": Ray knows whether it has started a cluster here
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        fix = "give HOST:PORT" if found.named_by == "--address" else f"start one there, or unset {RAY_ADDRESS}"
        raise UserError(found.named_by, f"{found.where}: no Ray cluster answers there ({error})", fix) from None


def _refuse_elsewhere(found: Existing) -> None:
    """Raise UserError where this machine is no node of the cluster: Ray would look for its own raylet for a minute."""
    if ":" not in found.where:
        return  # "auto" is found by the files of a node here
    from ray import _raylet

    internals: Any = _raylet  # compiled: its stub names few of them
    nodes: dict[str, str] = {}
    end = time.monotonic() + ANSWER_S
    while not nodes and time.monotonic() < end:  # a cluster that is just starting answers before its head is a node
        with _silent():
            known = internals.GcsClient(address=found.where).get_all_node_info(timeout=ANSWER_S).values()
        nodes = {node.node_manager_address: node.raylet_socket_name for node in known if node.state == 0}
        time.sleep(0 if nodes else 0.1)
    refuse_no_node(found, nodes)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what Ray's C++ writes off standard error: it tells of a wrong token what is told better by who raises it."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        for handle in (kept, nothing):
            os.close(handle)


def refuse_no_node(found: Existing, nodes: Mapping[str, str]) -> None:
    """Raise UserError where none of the living nodes (address -> its raylet's socket) is this machine.

    A node behind a translation of addresses has one that no interface here has; its socket tells.
    """
    here = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    if not any(address in here or _in_this_network(raylet) for address, raylet in nodes.items()):
        host = found.where.rpartition(":")[0]
        raise UserError(
            found.named_by,
            f"{found.where}: this machine is no node of that cluster ({_some([*nodes])}), and a driver runs on one",
            f"use `manta submit … --address http://{host}:8265`",
        )


def _in_this_network(raylet: str) -> bool:
    """Whether a process in this one's network listens there: the file alone may be of another on this host."""
    with socket.socket(socket.AF_UNIX) as knocking:
        try:
            knocking.settimeout(ANSWER_S)
            knocking.connect(raylet)
            pid, _, _ = struct.unpack("3i", knocking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
        except (OSError, AttributeError):  # AttributeError: no Linux
            return False


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", …" * (len(names) > 3) if names else "it has none"


def token_mode() -> dict[str, str]:
    """Ray 2.60 protects its clusters with a token, and sends the one it has only in this mode. A user's own wins."""
    return {"RAY_AUTH_MODE": "token"} if "RAY_AUTH_MODE" not in os.environ and has_token() else {}


def has_token() -> bool:
    """Whether this user has a token, where Ray looks for one."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return place.exists()
    except OSError:
        return False
