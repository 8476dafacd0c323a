"""Notes: what Ray workers leave for their driver, in the memory of Ray's GCS.

Not in the run's directory: that this can no longer be written may be just what there is to tell.
"""

import json
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

NAMESPACE = b"manta"
STARTS = "starts"  # how often the workers were started
FAILURE = "failure"  # an error that would only come again
WAITED = "waited"  # for how many seconds there has been no room for the workers


class Notes:
    """Notes of one attempt at a run, which has a key of its own."""

    def __init__(self, key: str) -> None:
        self._key = key

    def read(self, name: str) -> Any:
        """The note's content; None where there is none."""
        content = _internal_kv_get(self._full(name), namespace=NAMESPACE)
        return None if content is None else json.loads(content)

    def write(self, name: str, content: Any) -> None:
        """Leave what JSON can hold."""
        _internal_kv_put(self._full(name), json.dumps(content).encode(), overwrite=True, namespace=NAMESPACE)

    def clear(self) -> None:
        """Remove all of them."""
        _internal_kv_del(self._key.encode(), del_by_prefix=True, namespace=NAMESPACE)

    def _full(self, name: str) -> bytes:
        return f"{self._key}/{name}".encode()
