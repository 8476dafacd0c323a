"""Draining: the nodes that a cluster is about to take away, as Ray's GCS knows them from whoever asked for it."""

import time
from collections.abc import Collection, Mapping

DRIVER = "the driver's node is drained"


def draining(nodes: Collection[str]) -> dict[str, int]:
    """Of these nodes' ids, those that go, and when, in ms since 1970; 0 where nobody has said so."""
    from ray._private.state import state  # no public table has it

    return {node: when for node, when in state.get_draining_nodes().items() if node in nodes}


def drains(nodes: Mapping[str, int]) -> str:
    """In words: which nodes go, and when the first does."""
    import ray

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    names = ", ".join(f"{addresses.get(node, 'unknown')} ({node[:8]})" for node in nodes)
    known = [when for when in nodes.values() if when]
    return f"node {names} is drained" + (f", and goes in {min(known) / 1000 - time.time():.0f} s" if known else "")
