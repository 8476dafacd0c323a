"""Signature: what one row of a data set holds: named columns."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from nn_models.columns import AnyColumn, Column
from nn_models.errors import UserError
from nn_models.spec import Spec, invalid

if TYPE_CHECKING:  # models need torch, descriptions do not
    from nn_models.batch import Batch


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
        if not isinstance(data, Mapping) or not set(data) & {"input_shape", "num_outputs", "condition_shape"}:
            return data
        rest = dict(data)
        columns = {
            name: _of_shape(shape)
            for name, shape in (
                ("input", rest.pop("input_shape", None)),
                ("condition", rest.pop("condition_shape", None)),
            )
            if shape is not None
        }
        if (num_outputs := rest.pop("num_outputs", None)) is not None:
            columns["target"] = {"kind": "label", "size": num_outputs}
        return {"columns": columns, **rest}

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
        return Batch(columns, Place.of(rows), lambda: torch.arange(rows))


def _of_shape(shape: Any) -> Any:
    if isinstance(shape, (list, tuple)) and len(shape) == 3:
        return {"kind": "image", "shape": shape}
    if isinstance(shape, (list, tuple)) and len(shape) == 1:
        return {"kind": "features", "size": shape[0]}
    raise invalid(f"must be (channels, height, width) or (features,), not {shape!r}", field="input_shape")
