"""pairs: rows of two images, one to start from (the condition) and one to be made of it, for image-to-image models."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt, SerializationInfo, field_serializer, model_validator

from cluster.data.layouts import Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import UNLABELLED, DataSpec, DrawnTestSpec, Part, Source, pixels
from cluster.data.sources.columns import ArrayColumns, LabelColumn, Reader, Shape, array_columns
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import CIFAR10Spec, DigitsSpec, FashionMNISTSpec, MNISTSpec
from cluster.data.sources.parquet import (
    Group,
    ParquetColumns,
    ParquetFiles,
    ParquetSpec,
    check_target,
    class_names,
    first_row,
)
from cluster.data.sources.pixels import edges
from cluster.data.split import Traits
from nn_models.errors import UserError
from nn_models.spec import invalid

AnyImagesSpec = Annotated[
    DigitsSpec | FashionMNISTSpec | MNISTSpec | CIFAR10Spec | ImageFolderSpec | ParquetSpec,
    Field(discriminator="kind"),
]

COLUMN_FIELDS = ("path", "test_path", "condition", "input", "target", "image_shape", "condition_channels", "group")
# Of the section inside `edges_of` only what says which images there are counts; these stand in the outer section.
OUTER_FIELDS = frozenset(
    {*DataSpec.TRAINING_FIELDS, "validation_fraction", "split_seed", "stratify", "anomaly", "test_fraction"}
)


class PairsSpec(DrawnTestSpec):
    """Pairs of images: any images and their edges (`edges_of`), or two columns of Parquet files.

    Rows of Parquet files without a `target` are all of one class, named "all".
    """

    kind: Literal["pairs"] = "pairs"
    edges_of: AnyImagesSpec | None = Field(
        None, description="a data section of images, each of which is to be made from its edges"
    )
    path: str | None = Field(None, min_length=1, description="a Parquet file or a folder of them, local or a URI")
    test_path: str | None = Field(None, min_length=1, description="the test split, where it stands apart")
    condition: str | None = Field(None, min_length=1, description="the column with the image to start from")
    input: str | None = Field(None, min_length=1, description="the column with the image to be made")
    target: str | None = Field(None, min_length=1, description="the column with the label, if there is one")
    image_shape: Shape | None = Field(
        None, description="(channels, height, width) of both images; needed for lists, and to resize encoded images"
    )
    condition_channels: PositiveInt | None = Field(
        None, description="channels of the image to start from, where it has not as many as the other"
    )
    group: Group = None

    @field_serializer("edges_of")
    def _only_what_counts(self, section: DataSpec | None, info: SerializationInfo) -> dict[str, Any] | None:
        if section is None:
            return None
        return section.model_dump(mode=info.mode, exclude=set(OUTER_FIELDS), exclude_unset=info.exclude_unset)

    @model_validator(mode="after")
    def _one_way_or_the_other(self) -> Self:
        columns = [field for field in COLUMN_FIELDS if getattr(self, field) is not None]
        if self.edges_of is None:
            if not columns:
                raise invalid(
                    "pairs need either edges_of (a data section of images, to be made from their edges) or path, "
                    "condition and input (image columns of Parquet files)"
                )
            for field in ("path", "condition", "input"):
                if field not in columns:
                    raise invalid("missing; pairs from Parquet files need path, condition and input", field=field)
            check_target(self.target, (str(self.input), str(self.condition)))
            return self
        if columns:
            raise invalid(
                "edges_of makes the pairs, and needs no columns", "leave out one or the other", field=columns[0]
            )
        if misplaced := sorted(OUTER_FIELDS & self.edges_of.model_fields_set):
            raise invalid("belongs to the pairs", f"set data.{misplaced[0]}", field=f"edges_of.{misplaced[0]}")
        return self

    @property
    def _files(self) -> ParquetFiles:
        assert self.path is not None  # _one_way_or_the_other refuses it
        return ParquetFiles(self.path, self.test_path)

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        if self.edges_of is None:
            return self.model_copy(update=self._files.resolved(base))
        return self.model_copy(update={"edges_of": self.edges_of.resolved(base)})

    def fingerprint(self) -> str:
        """See DataSpec."""
        if self.edges_of is None:
            return self._files.fingerprint()
        with _fields_of(self.edges_of):
            return self.edges_of.fingerprint()

    def open(self) -> Source:
        """See DataSpec. Refuses what are no images, and images of different sizes."""
        if self.edges_of is None:
            return self._from_columns()
        with _fields_of(self.edges_of):
            images = self.edges_of.open()
        shape, dtype = images.columns["input"].column.row_shape, images.columns["input"].dtype
        if len(shape) != 3 or shape[0] not in (1, 3) or dtype != "uint8":
            raise UserError(
                "data.edges_of",
                f"{self.edges_of.kind} has rows of shape {shape} {dtype}, which have no edges",
                "give images of 1 or 3 channels of whole numbers",
            )
        return EdgePairs(self.edges_of, images)

    def _from_columns(self) -> ParquetColumns:
        assert self.input is not None  # _one_way_or_the_other refuses it
        assert self.condition is not None
        wanted = [self.input, self.condition, *([self.target] if self.target else [])]
        pools = self._files.parts([*wanted, *([self.group] if self.group else [])])
        name, first = first_row(pools["train"], wanted)
        made = array_columns(first, name, (self.input,), image_shape=self.image_shape)
        channels = self.condition_channels or made.shape[0]
        shape = self.image_shape and (channels, *self.image_shape[1:])
        given = array_columns(first, name, (self.condition,), image_shape=shape, channels=channels)
        for array in (made, given):
            _check_image(array, name)
        if made.shape[1:] != given.shape[1:]:
            raise UserError(
                f"{name}, row 0",
                f"{_size(given)} pixels in column {self.condition} where {self.input} has {_size(made)}",
                "set data.image_shape to resize both",
            )
        names = class_names(pools["train"], self.target, or_numbers=False) if self.target else UNLABELLED
        readers: dict[str, Reader] = {
            "input": made,
            "target": LabelColumn(self.target, names),
            "condition": replace(given, moments=False),
        }
        return ParquetColumns(readers, pools, self.group)


@dataclass(frozen=True)
class EdgePairs:
    """The images of another source, with the edges in each of them as what it is to be made from."""

    section: DataSpec
    images: Source

    @property
    def columns(self) -> dict[str, StoredColumn]:
        """See Source."""
        _, *size = self.images.columns["input"].column.row_shape
        return {**self.images.columns, "condition": pixels((1, *size), moments=False)}

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return self.images.pools

    def load(self, part: Part) -> dict[str, Layout]:
        """See Source."""
        with _fields_of(self.section):
            rows = self.images.load(part)
        images = rows["input"]
        assert isinstance(images, Dense)  # open() refuses what are no images of bytes
        return {**rows, "condition": Dense(edges(images.values.astype(np.uint8, copy=False)))}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        with _fields_of(self.section):
            return self.images.traits(part)


def _check_image(array: ArrayColumns, name: str) -> None:
    column = array.names[0]
    if len(array.shape) != 3:
        raise UserError(
            name,
            f"column {column} holds lists of {array.shape[0]} numbers",
            "set data.image_shape to the images' (channels, height, width)",
        )
    if array.dtype != "uint8":
        raise UserError(name, f"column {column} holds fractions; the images of a pair are whole numbers of 0 to 255")


def _size(array: ArrayColumns) -> str:
    return "x".join(map(str, array.shape[1:]))


@contextmanager
def _fields_of(section: DataSpec) -> Iterator[None]:
    """The section's errors name its fields as if it stood alone: here data.root is data.edges_of.root."""
    try:
        yield
    except UserError as error:
        fields = type(section).model_fields
        raise error.moved({f"data.{field}": f"data.edges_of.{field}" for field in fields}) from None
