"""Lifeline: whether the two processes of Ray's that a driver hangs on still answer.

Where the node's raylet or the cluster's GCS dies, Ray's C++ ends the driver after 20 to 70 s, past Python's `finally`.
Until then calls of Ray's wait, or fail in many ways: who waits for long asks here in between.
"""

import socket
import time
from typing import Any

POLL_S = 0.5  # how often those who wait ask
ANSWER_S = 2.0
CLUSTER_PATIENCE_S = 10.0  # a cluster's GCS may be started again, or its network fail for a moment


class Lifeline:
    """The raylet and the GCS that this process is connected to."""

    def __init__(self, ray: Any, *, embedded: bool) -> None:
        """Of an embedded Ray, whose processes nobody starts again, the first refusal counts."""
        self._patience_s = 0.0 if embedded else CLUSTER_PATIENCE_S
        node = ray._private.worker._global_node  # no public way leads to the raylet's socket
        host, _, port = node.gcs_address.rpartition(":")
        self._places: dict[str, tuple[socket.AddressFamily, Any]] = {
            "raylet": (socket.AF_UNIX, node.raylet_socket_name),
            "GCS": (socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))),
        }
        self._silent_since: dict[str, float] = {}

    def broken(self) -> str | None:
        """What has died, in words; None while both answer."""
        now = time.monotonic()
        for name, (family, place) in self._places.items():
            if _answers(family, place, patient=bool(self._patience_s)):
                self._silent_since.pop(name, None)
            elif now - self._silent_since.setdefault(name, now) >= self._patience_s:
                return f"Ray's {name} has died"
        return None


def _answers(family: socket.AddressFamily, place: Any, *, patient: bool) -> bool:
    """Whether something listens there; what is only slow to answer (a full queue) does, unless it is far away."""
    with socket.socket(family) as knocking:
        knocking.settimeout(ANSWER_S)
        try:
            knocking.connect(place)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return not patient
    return True
