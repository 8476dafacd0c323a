"""Signature: what one row of a data set holds: named columns."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from nn_models.columns import AnyColumn, Column
from nn_models.errors import UserError, did_you_mean
from nn_models.spec import Spec, invalid, short

if TYPE_CHECKING:  # models need torch, descriptions do not
    from nn_models.batch import Batch


SHORT = ("input_shape", "num_outputs", "condition_shape")


class Signature(Spec):
    """What one row of a data set holds under each name.

    `input` is what a model reads, `target` what it is to predict, `condition` what it starts from. For images, feature
    vectors and classes there is a short form: `Signature(input_shape=(3, 224, 224), num_outputs=1000)`, where
    `input_shape` is (channels, height, width) or (features,), and `condition_shape` that of an image to start from.
    """

    columns: dict[str, AnyColumn]

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not set(data) & set(SHORT):
            return data
        for field in data:
            if field not in SHORT:
                raise invalid("unknown field", did_you_mean(str(field), SHORT), field=str(field), kind="unknown field")
        given = {name: value for name, value in data.items() if value is not None}
        columns = {
            name: _of_shape(given[field], field)
            for name, field in (("input", "input_shape"), ("condition", "condition_shape"))
            if field in given
        }
        if "num_outputs" in given:
            if not _positive(given["num_outputs"]):
                raise invalid(f"must be a number above 0, not {given['num_outputs']!r}", field="num_outputs")
            columns["target"] = {"kind": "label", "size": int(given["num_outputs"])}
        return {"columns": columns}

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Column:
        """A column. Raises UserError where there is none of this name."""
        if name not in self.columns:
            raise UserError(
                "data", f"its rows have no {name}, but {', '.join(self.columns)}", "choose another data set"
            )
        return self.columns[name]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one row's input: (channels, height, width) of images, (features,) of feature vectors."""
        return self["input"].row_shape

    @property
    def input_size(self) -> int:
        """Numbers in one row's input."""
        return math.prod(self.input_shape)

    @property
    def condition_shape(self) -> tuple[int, ...] | None:
        """Of the image that a row starts from; None where there is none."""
        return self["condition"].row_shape if "condition" in self else None

    @property
    def num_outputs(self) -> int:
        """Classes to choose from, or numbers to predict."""
        return self["target"].num_outputs

    def describe(self) -> str:
        """For people: `input: image 1 x 28 x 28, target: label of 10 classes`."""
        return ", ".join(f"{name}: {column.describe()}" for name, column in self.columns.items())

    def imagine(self, rows: int) -> "Batch":
        """Some rows to rehearse with, on the device that is current; the meta device will do."""
        import torch

        from nn_models.batch import Batch, Place

        columns = {name: column.imagine(rows) for name, column in self.columns.items()}
        return Batch(columns, Place.of(rows), lambda: torch.arange(rows), stored=columns)


def _of_shape(shape: Any, field: str) -> dict[str, Any]:
    if isinstance(shape, (list, tuple)) and all(_positive(size) for size in shape):
        if len(shape) == 3:
            return {"kind": "image", "shape": [int(size) for size in shape]}
        if len(shape) == 1 and field == "input_shape":
            return {"kind": "features", "size": int(shape[0])}
    features = " or (features,)" if field == "input_shape" else ""
    raise invalid(f"must be (channels, height, width){features}, numbers above 0, not {short(shape)}", field=field)


def _positive(size: Any) -> bool:
    return isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0
