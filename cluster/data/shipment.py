"""Shipment: a prepared data set that reaches nodes which have no file of it, once for each node's cache."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.data.cache import cache_root, publish
from cluster.data.manifest import MANIFEST, Manifest, Shard
from cluster.data.shards import DataSet
from cluster.storage import Folder
from nn_models.errors import UserError

PATIENCE_S = 3600.0  # with another process of the node, which is writing the same


@dataclass(frozen=True)
class Shipment:
    """A data set that lies at `where` on the driver's node.

    `fetch` gives the content of a shard, by its file's name, on any node, as what a memoryview can be made of.
    """

    where: str
    manifest: Manifest
    fetch: Callable[[str], Any]

    def arrived(self) -> DataSet:
        """The data set on this node: where it lies, if that is seen from here, or in this node's cache.

        Raises UserError where what comes is not what the manifest says, StorageFailed where it cannot be written.
        """
        if lies_at(self.where, self.manifest):
            return DataSet(self.where)
        folder = cache_root() / "data" / f"shipped-{_digest(self.manifest)}"
        while not (folder / MANIFEST).exists():
            arriving = Folder(folder.with_name(f".{folder.name}")).create()
            with arriving.claimed(patience_s=PATIENCE_S):  # it stays so where another process renames it meanwhile
                if not (folder / MANIFEST).exists():
                    self._unpack(arriving)
                    publish(Path(arriving.path), folder)
        return DataSet(Folder(folder))

    def _unpack(self, folder: Folder) -> None:
        for shard in shards_of(self.manifest):
            content = memoryview(self.fetch(shard.file))
            if hashlib.sha256(content).hexdigest() != shard.sha256:
                problem = "the shard does not have the checksum of the manifest: it is corrupt"
                fix = f"delete {self.where} and prepare the data again"
                raise UserError(f"{self.where}/{shard.file}", problem, fix)
            folder.write_bytes(shard.file, content)
        folder.write_text(MANIFEST, _text(self.manifest))  # last: without it there is no data set


def lies_at(where: str, manifest: Manifest) -> bool:
    """Whether the data set of this manifest is seen there; its shards by their sizes, as wherever one is opened."""
    try:
        return DataSet(where).manifest == manifest
    except UserError:
        return False


def shards_of(manifest: Manifest) -> list[Shard]:
    """Those of all splits."""
    return [shard for shards in manifest.splits.values() for shard in shards]


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest.content(), indent=1, ensure_ascii=False)


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(_text(manifest).encode()).hexdigest()[:16]
