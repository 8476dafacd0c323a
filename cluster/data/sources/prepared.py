"""shards: a data set that `manta data prepare` has written."""

from typing import Literal

from pydantic import Field

from cluster.data.sources.base import DataSpec, absolute


class ShardsSpec(DataSpec):
    """A data set that `manta data prepare` has written; its splits are fixed."""

    kind: Literal["shards"] = "shards"
    path: str = Field(min_length=1, description="the folder with manifest.json, local or a URI")

    @property
    def prepared_at(self) -> str:
        """See DataSpec."""
        return self.path

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={"path": absolute(self.path, base)})
