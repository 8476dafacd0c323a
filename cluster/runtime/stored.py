"""Stored: contents in Ray's object store, put there once, which any process of the cluster fetches by their names."""

from collections.abc import Iterable
from typing import Any

import numpy as np


class Stored:
    """Called with a name, it gives the content, without a copy where the node has it already."""

    def __init__(self, ray: Any, contents: Iterable[tuple[str, Any]]) -> None:
        """Names and what a memoryview can be made of, one in memory at a time. They stay while this object is kept."""
        self._references = {name: ray.put(np.frombuffer(content, np.uint8)) for name, content in contents}

    def __call__(self, name: str) -> Any:
        """The content, which is not to be written on."""
        import ray

        return ray.get(self._references[name])
