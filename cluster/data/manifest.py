"""Manifest: what stands beside the shards: columns, rows, row groups, checksums, normalisation statistics."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.storage import Folder
from nn_models.columns import AnyColumn
from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.spec import Spec, invalid, validate

MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
AGAIN = "prepare the data again"
PREDICTED_BYTES = 8  # of what is predicted in a row, whatever it is: see Manifest.row_bytes

BYTES = {"uint8": 1, "int32": 4, "float32": 4, "int64": 8}


class Shard(Spec):
    """One Parquet file."""

    file: str
    rows: PositiveInt
    row_groups: tuple[PositiveInt, ...]  # rows of each
    bytes: PositiveInt
    sha256: str

    @model_validator(mode="after")
    def _lies_beside(self) -> Self:
        # a manifest may come from anywhere, and shards are written by these names where a data set travels
        if self.file in ("", ".", "..") or set(self.file) & set("/\\\0"):
            raise invalid(f"file is no name of a file beside the manifest: {self.file!r}", AGAIN)
        return self

    @model_validator(mode="after")
    def _rows_add_up(self) -> Self:
        if sum(self.row_groups) != self.rows:
            raise invalid(f"row_groups hold {sum(self.row_groups)} rows, not {self.rows}", AGAIN)
        return self


class StoredColumn(Spec):
    """A column as it is stored.

    `mean` and `std` are those of the training rows: a number for each channel of images (whose bytes count as 0 to 1),
    for each feature, or for each number of a sequence's elements.
    """

    column: AnyColumn
    dtype: Literal["uint8", "float32", "int64", "int32"] = Field("float32", description="of rows of one shape")
    moments: bool = Field(True, description="whether a column of numbers has mean and std")
    mean: tuple[float, ...] = ()
    std: tuple[PositiveFloat, ...] = ()
    elements: NonNegativeFloat = Field(0.0, description="of a training row, where rows differ in length: the mean")

    @property
    def measured(self) -> bool:
        """Whether mean and std of the training rows belong to it."""
        return self.column.scaled and self.moments

    @property
    def unit(self) -> float:
        """What a stored number counts as 1."""
        return 255.0 if self.dtype == "uint8" else 1.0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory, the mean where rows differ; none for what is predicted."""
        if self.column.predicted:
            return 0
        if self.column.layout == "dense":
            return math.prod(self.column.row_shape) * BYTES[self.dtype]
        fields = self.column.ragged_fields().values()
        return math.ceil(self.elements * sum(BYTES[field.dtype] * math.prod(field.shape) for field in fields))

    @property
    def num_moments(self) -> int:
        """How many means there are: a channel's of images, a number's of vectors and of elements."""
        shape = self.column.row_shape
        return shape[0] if len(shape) in (1, 3) else shape[-1]


class Manifest(Spec):
    """The content of manifest.json."""

    version: Literal[2] = 2
    source: str
    columns: dict[str, StoredColumn]
    order: Literal["shuffled", "streams"] = "shuffled"  # streams: rows are windows of one text, read on and on
    splits: dict[str, tuple[Shard, ...]]  # by the names in SPLITS

    @model_validator(mode="before")
    @classmethod
    def _lifted(cls, data: Any) -> Any:
        """Version 1 knew an input, a target and an image to start from. Its Parquet columns are the same."""
        if not isinstance(data, Mapping):
            return data
        if (version := data.get("version", 2)) not in (1, 2):
            raise invalid(f"must be 1 or 2, not {version!r}", AGAIN, field="version")
        return _from_version_1(data) if version == 1 or "input_shape" in data else data

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        for name, stored in self.columns.items():
            wanted = {stored.num_moments} if stored.measured else {0}
            if stored.column.predicted and not stored.mean:  # numbers that an earlier version left as they are
                wanted = {0}
            if {len(stored.mean), len(stored.std)} != wanted:
                raise invalid(f"the shape, mean and std of {name} do not fit each other", AGAIN)
        if unknown := set(self.splits) - set(SPLITS):
            raise invalid(f"unknown splits {', '.join(sorted(unknown))}", AGAIN)
        return self

    @property
    def signature(self) -> Signature:
        """What the model must fit."""
        return Signature(columns={name: stored.column for name, stored in self.columns.items()})

    def content(self) -> dict[str, Any]:
        """For manifest.json: without what was left at its default."""
        usual = {"order"} if self.order == "shuffled" else set()
        return {"version": self.version, **self.model_dump(mode="json", exclude_unset=True, exclude=usual)}

    def rows(self, split: str) -> NonNegativeInt:
        """Rows in a split; 0 where there is no such split."""
        return sum(shard.rows for shard in self.splits.get(split, ()))

    def row_groups(self, split: str) -> list[int]:
        """Rows in each row group of a split, in the order of the row ids."""
        return [rows for shard in self.splits.get(split, ()) for rows in shard.row_groups]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory. What is predicted counts 8, as ever: the shuffle window follows from this."""
        predicted = PREDICTED_BYTES * any(stored.column.predicted for stored in self.columns.values())
        return sum(stored.row_bytes for stored in self.columns.values()) + predicted

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels to predict; none for numbers."""
        target = self.columns.get("target")
        return getattr(target.column, "names", ()) if target else ()

    def unknown_tokens(self) -> list[str]:
        """What to say of tokens that are not in the vocabulary: a line for each column and split that has some."""
        lines = []
        for name, stored in self.columns.items():
            for split, (unknown, every) in getattr(stored.column, "unknown", {}).items():
                if unknown:
                    share = f"{unknown:,} of {every:,} tokens ({100 * unknown / every:.2g} %)"
                    lines.append(
                        f"{share} of {name} in {split} are not in the vocabulary of {len(stored.column.vocabulary):,}"
                    )
        return lines

    def absent_classes(self) -> dict[str, list[str]]:
        """Split -> the classes of which it has no row, where their numbers are known."""
        target = self.columns.get("target")
        counts = getattr(target.column, "counts", {}) if target else {}
        names = self.class_names
        absent = {
            split: [names[index] if names else str(index) for index, count in enumerate(found) if not count]
            for split, found in counts.items()
        }
        return {split: missing for split, missing in absent.items() if missing}


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a prepared data set. Raises UserError where there is none or it is damaged."""
    try:
        content = folder.read_json(MANIFEST)
    except FileNotFoundError:
        raise UserError(
            str(folder),
            f"no prepared data set here ({MANIFEST} is missing)",
            "prepare the data with `manta data prepare SOURCE --out PATH`",
        ) from None
    return validate(Manifest, content, prefix=f"{folder}/{MANIFEST}")


VERSION_1 = {
    "version", "input_shape", "input_dtype", "condition_shape", "target_kind", "num_outputs", "class_names", "mean",
    "std",
}  # fmt: skip


def _from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    shape, names, given = data.get("input_shape"), data.get("class_names") or (), data.get("condition_shape")
    if not isinstance(shape, (list, tuple)) or len(shape) not in (1, 3):
        raise invalid(f"must be (channels, height, width) or (features,), not {shape!r}", AGAIN, field="input_shape")
    if (kind := data.get("target_kind")) not in ("label", "number"):
        raise invalid(f"must be label or number, not {kind!r}", AGAIN, field="target_kind")
    if kind == "label" and (not isinstance(names, (list, tuple)) or len(names) != data.get("num_outputs")):
        raise invalid("num_outputs is not the number of class_names", AGAIN)
    image = {"kind": "image", "shape": shape} if len(shape) == 3 else {"kind": "features", "size": shape[0]}
    label = {"kind": "label", "names": names, "size": data.get("num_outputs")}
    columns: dict[str, Any] = {
        "input": {
            "column": image,
            "dtype": data.get("input_dtype"),
            **{name: data[name] for name in ("mean", "std") if name in data},
        },
        "target": {"column": label, "dtype": "int64"}
        if kind == "label"
        else {"column": {"kind": "numbers", "size": data.get("num_outputs")}, "dtype": "float32"},
    }
    if given is not None:
        if not isinstance(given, (list, tuple)) or list(given[1:]) != list(shape[1:]):
            raise invalid("condition_shape and the input do not fit each other", AGAIN)
        columns["condition"] = {"column": {"kind": "image", "shape": given}, "dtype": "uint8", "moments": False}
    rest = {name: value for name, value in data.items() if name not in VERSION_1}
    return {"version": 2, "columns": columns, **rest}
