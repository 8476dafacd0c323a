"""Manifest: what stands beside the shards: schema, rows, row groups, checksums, normalisation statistics."""

import math
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.storage import Folder
from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.spec import Spec, invalid, validate

MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")

TargetKind = Literal["label", "number"]


class Shard(Spec):
    """One Parquet file."""

    file: str
    rows: PositiveInt
    row_groups: tuple[PositiveInt, ...]  # rows of each
    bytes: PositiveInt
    sha256: str

    @model_validator(mode="after")
    def _rows_add_up(self) -> Self:
        if sum(self.row_groups) != self.rows:
            raise invalid(f"row_groups hold {sum(self.row_groups)} rows, not {self.rows}", "prepare the data again")
        return self


class Manifest(Spec):
    """The content of manifest.json.

    `mean` and `std` are those of the training split's inputs: a number for each channel of images (whose bytes count
    as 0 to 1), or for each feature. Where rows are pairs of images, `condition_shape` is that of the image to start
    from, uint8 as the input, and of its height and width.
    """

    version: Literal[1] = 1
    source: str
    input_shape: tuple[PositiveInt, ...]
    input_dtype: Literal["uint8", "float32"]
    condition_shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    target_kind: TargetKind
    num_outputs: PositiveInt
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    splits: dict[str, tuple[Shard, ...]]  # by the names in SPLITS

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        if len(self.input_shape) not in (1, 3) or {len(self.mean), len(self.std)} != {self.input_shape[0]}:
            raise invalid("input_shape, mean and std do not fit each other", "prepare the data again")
        if self.condition_shape and (self.condition_shape[1:] != self.input_shape[1:] or self.input_dtype != "uint8"):
            raise invalid("condition_shape and the input do not fit each other", "prepare the data again")
        if self.target_kind == "label" and len(self.class_names) != self.num_outputs:
            raise invalid("num_outputs is not the number of class_names", "prepare the data again")
        if unknown := set(self.splits) - set(SPLITS):
            raise invalid(f"unknown splits {', '.join(sorted(unknown))}", "prepare the data again")
        return self

    @property
    def signature(self) -> Signature:
        """What the model must fit."""
        return Signature(
            input_shape=self.input_shape, num_outputs=self.num_outputs, condition_shape=self.condition_shape
        )

    def rows(self, split: str) -> NonNegativeInt:
        """Rows in a split; 0 where there is no such split."""
        return sum(shard.rows for shard in self.splits.get(split, ()))

    def row_groups(self, split: str) -> list[int]:
        """Rows in each row group of a split, in the order of the row ids."""
        return [rows for shard in self.splits.get(split, ()) for rows in shard.row_groups]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory, the 8 of its target included."""
        return self.signature.input_size * (1 if self.input_dtype == "uint8" else 4) + self.condition_size + 8

    @property
    def condition_size(self) -> int:
        """Bytes of one row's image to start from; 0 where there is none."""
        return math.prod(self.condition_shape) if self.condition_shape else 0


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a prepared data set. Raises UserError where there is none or it is damaged."""
    try:
        content = folder.read_json(MANIFEST)
    except FileNotFoundError:
        fix = "prepare the data with `manta data prepare SOURCE --out PATH`"
        raise UserError(str(folder), f"no prepared data set here ({MANIFEST} is missing)", fix) from None
    return validate(Manifest, content, prefix=f"{folder}/{MANIFEST}")
