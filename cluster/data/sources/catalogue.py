"""The explicit union of all data sections: THE list of sources."""

from typing import Annotated

from pydantic import Field

from cluster.data.sources.base import DataSpec
from cluster.data.sources.columns import ParquetSpec, ShardsSpec
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import CIFAR10Spec, DigitsSpec, FashionMNISTSpec, MNISTSpec

AnyDataSpec = Annotated[
    DigitsSpec | FashionMNISTSpec | MNISTSpec | CIFAR10Spec | ImageFolderSpec | ParquetSpec | ShardsSpec,
    Field(discriminator="kind"),
]

SOURCES: dict[str, type[DataSpec]] = {
    "digits": DigitsSpec,
    "fashion_mnist": FashionMNISTSpec,
    "mnist": MNISTSpec,
    "cifar10": CIFAR10Spec,
    "image_folder": ImageFolderSpec,
    "parquet": ParquetSpec,
    "shards": ShardsSpec,
}
