"""Sharing: what the nodes of a cluster see of a run's files, before anything starts: they are given it, or refused."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.data.shards import DataSet
from cluster.data.shipment import Shipment, lies_at, shards_of
from cluster.runtime import RaySession, Workers, places
from cluster.runtime.existing import STORAGE
from cluster.runtime.limits import size
from cluster.runtime.nodes import Node, ask_each, living_nodes, not_shared
from cluster.runtime.stored import Stored
from cluster.storage import Folder
from cluster.training.splits import Splits
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

MOST_OF_STORE = 0.5  # of the memory that a node's object store has: the tables of what is held are there as well


def other_nodes(session: RaySession, workers: Workers) -> list[Node]:
    """The nodes beside this process's own which such workers may be started on; those that come later are not known."""
    if session.embedded:
        return []
    here = session.ray.get_runtime_context().get_node_id()
    return [n for n in living_nodes(session.ray) if n.id != here and places(workers.bundle, [n.resources])]


def refuse_unshared(session: RaySession, nodes: Sequence[Node], folder: Folder) -> None:
    """Raise UserError where one of the nodes does not see the directory of a run or sweep, or may not write there.

    Whoever trains writes there, and reads what another has written: its newest checkpoint above all.
    """
    if not nodes or folder.local is None:
        return
    was_there = folder.exists()
    folder.create()
    try:
        found = not_shared(session.ray, list(nodes), folder)
    finally:
        if not was_there:
            folder.delete()  # the run begins in it, or does not
    if found:
        told = "; ".join(f"{node} {what}" for node, what in list(found.items())[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            "--run",
            f"{folder} is not one directory for all nodes that may train: {told}{more}",
            f"give --run a URI or a folder that all of them share, or set {STORAGE} to one",
        )


def reaching(session: RaySession, nodes: Sequence[Node], data: DataSet, splits: Splits) -> Splits:
    """The splits as workers on these nodes can use them where they read the prepared files themselves.

    Where some do not see the files, these travel through the object store into such nodes' caches. Raises UserError
    where they are too many for that.
    """
    if not nodes or data.folder.local is None:
        return splits
    found = ask_each(session.ray, list(nodes), lies_at, data.folder.uri, data.manifest)
    lacking = [node for node in nodes if found.get(node) is not True]  # one that has not answered is sent them too
    if not lacking:
        return splits
    total = sum(shard.bytes for shard in shards_of(data.manifest))
    names = ", ".join(map(str, lacking[:3])) + ", …" * (len(lacking) > 3)
    most = int(MOST_OF_STORE * _store_bytes(session.ray))
    if total > most:
        raise UserError(
            "data",
            f"the prepared files in {data.folder} are not seen on {names}, and {size(total)} are more than the "
            f"{size(most)} that travel through the object store",
            "prepare them where all nodes read (`manta data prepare RECIPE --out s3://…`, data.kind: shards), or set "
            "MANTA_CACHE to a folder that all nodes share",
        )
    logger.info("data: %s of prepared files travel to %s, which do not see %s", size(total), names, data.folder)
    contents = ((shard.file, data.folder.read_buffer(shard.file)) for shard in shards_of(data.manifest))
    return replace(splits, shipment=Shipment(data.folder.uri, data.manifest, Stored(session.ray, contents)))


def _store_bytes(ray: Any) -> float:
    """Memory of the object store of this process's node."""
    here = ray.get_runtime_context().get_node_id()
    return next(float(n.resources.get("object_store_memory", 0)) for n in living_nodes(ray) if n.id == here)
