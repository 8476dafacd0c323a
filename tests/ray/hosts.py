"""Nodes and a head that trains nothing, on this machine: `python -m tests.ray.hosts [3]`, until standard input ends.

Prints {"address", "raylets": their process ids, "nodes": their ids, "head": that of the head}.
"""

import json
import os
import sys


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(int((sys.argv[1:] or ["3"])[0]))]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    ids = {"nodes": [node.node_id for node in nodes], "head": cluster.head_node.node_id}
    print(json.dumps({"address": cluster.address, "raylets": raylets, **ids}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    main()
