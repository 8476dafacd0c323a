"""The explicit union of all data sections: THE list of sources."""

from typing import Annotated, get_args

from pydantic import Field

from cluster.data.sources.base import DataSpec
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import CIFAR10Spec, DigitsSpec, FashionMNISTSpec, MNISTSpec
from cluster.data.sources.pairs import PairsSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.sources.prepared import ShardsSpec

AnyDataSpec = Annotated[
    DigitsSpec | FashionMNISTSpec | MNISTSpec | CIFAR10Spec | ImageFolderSpec | ParquetSpec | PairsSpec | ShardsSpec,
    Field(discriminator="kind"),
]

SOURCES: dict[str, type[DataSpec]] = {
    spec.model_fields["kind"].default: spec for spec in get_args(get_args(AnyDataSpec)[0])
}
