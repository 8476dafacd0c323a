"""sklearn: the small tables that come with scikit-learn, always there."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from cluster.data.layouts import Array, Dense, Layout
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import DrawnTestSpec, FileColumns, Fraction, Part, even_parts, labels
from cluster.data.split import Traits
from nn_models.columns import Features, Numbers

TableName = Literal["breast_cancer", "wine", "iris", "diabetes"]
TARGET = "target"  # the column of the label, or the number, where a file has such rows


@lru_cache(maxsize=len(get_args(TableName)))
def _table(name: str) -> Any:
    """scikit-learn's Bunch. Some of it is NumPy's own text, which it reads as it likes."""
    from sklearn import datasets

    return getattr(datasets, f"load_{name}")()


@dataclass(frozen=True)
class _Table:
    """See Source."""

    name: TableName

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none where a number is predicted."""
        return tuple(map(str, getattr(_table(self.name), "target_names", ())))

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        inputs = StoredColumn(column=Features(size=_table(self.name).data.shape[1]), dtype="float32")
        number = StoredColumn(column=Numbers(size=1), dtype="float32")
        return {"input": inputs, "target": labels(self.classes) if self.classes else number}

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        rows = len(_table(self.name).data)
        return {"train": even_parts(rows, rows)}

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        return {"input": Dense(_table(self.name).data.astype(np.float32)), "target": Dense(self._targets())}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        return Traits(labels=self._targets() if self.classes else None)

    def _targets(self) -> Array:
        targets = _table(self.name).target
        return targets.astype(np.int64) if self.classes else targets.astype(np.float32)[:, None]


class SklearnSpec(DrawnTestSpec):
    """The small tables bundled with scikit-learn, always there: breast cancer, wine, iris, diabetes."""

    kind: Literal["sklearn"] = "sklearn"
    table: TableName = Field(description="labels to predict, or of diabetes a number")
    test_fraction: Fraction = Field(0.2, description="share held out for test")

    @property
    def file_columns(self) -> FileColumns:
        """See DataSpec: the names that scikit-learn calls its features by."""
        return FileColumns(tuple(map(str, _table(self.table).feature_names)), TARGET)

    def open(self) -> _Table:
        """See DataSpec."""
        return _Table(self.table)
