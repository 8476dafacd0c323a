"""Nodes: a small question to each node of a cluster, such as whether it sees a folder of this one's."""

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import StorageFailed
from cluster.storage import Folder
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

ANSWER_S = 60  # a process is started on the node, and imports what the question needs


@dataclass(frozen=True)
class Node:
    """A living node of a cluster."""

    id: str
    address: str
    resources: Mapping[str, float] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:8]})"


def living_nodes(ray: Any) -> list[Node]:
    """All nodes that are alive."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in alive]


def ask_each(ray: Any, nodes: list[Node], question: Callable[..., Any], *arguments: Any) -> dict[Node, Any]:
    """What `question(*arguments)` returns on each node, or the exception that it ends with there.

    All are asked at once. A node that gives no answer in time, or dies, is left out, and logged.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = ray.remote(num_cpus=0, max_retries=0)(_answered)
    calls = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        calls[asked.options(scheduling_strategy=there).remote(question, arguments)] = node
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_S)
    found: dict[Node, Any] = {}
    for call in done:
        try:
            found[calls[call]] = ray.get(call)
        except ray.exceptions.RayError as error:
            logger.warning("node %s: %s", calls[call], str(error).strip().splitlines()[-1])
    for call in late:
        ray.cancel(call, force=True)
        logger.warning("node %s gives no answer for %d s", calls[call], ANSWER_S)
    return found


def _answered(question: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return question(*arguments)
    except Exception as error:  # whatever it may be, it is the answer
        return error


def not_shared(ray: Any, nodes: list[Node], folder: Folder) -> dict[Node, str]:
    """The nodes that do not see what this process writes into a folder, or may not write there, and what they found.

    The folder must be there; nothing is left in it.
    """
    name, token = f".seen-{uuid.uuid4().hex}", uuid.uuid4().hex
    folder.write_text(name, token)
    try:
        found = ask_each(ray, nodes, _seen, folder.uri, name, token)
    finally:
        folder.delete(name)
    return {node: str(answer) for node, answer in found.items() if answer is not None}


def _seen(uri: str, name: str, token: str) -> str | None:
    """What is wrong with a folder, as seen from here; None where nothing is."""
    try:
        folder = Folder(uri)
        if folder.read_text(name) != token:
            return "sees another folder there"
        own = f"{name}-{uuid.uuid4().hex}"
        folder.write_text(own, token)
        folder.delete(own)
    except FileNotFoundError:
        return "does not see it"
    except (UserError, StorageFailed) as error:
        return str(error)
    return None
