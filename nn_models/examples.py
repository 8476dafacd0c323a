"""Examples: some rows of a test, kept as columns of tensors: of all its rows, on all ranks, those of the highest score.

Shapes: B rows of a batch, n rows kept, N elements of these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from nn_models.batch import RowIds, Value, fields_of

NUM_EXAMPLES = 24  # of each sort

Gather = Callable[[Tensor], Sequence[Tensor]]  # every rank's tensor, in the ranks' order; they may differ in their rows


def gather_here(values: Tensor) -> list[Tensor]:
    """Every rank's tensor where there is one rank."""
    return [values]


@dataclass(frozen=True)
class _Rows:
    """Some rows: for each column its fields; `lengths` (n,) where rows differ in length, else None."""

    columns: Mapping[str, tuple[Mapping[str, Tensor], Tensor | None]]

    def take(self, where: Tensor) -> "_Rows":
        found: dict[str, tuple[Mapping[str, Tensor], Tensor | None]] = {}
        for name, (fields, lengths) in self.columns.items():
            places = where
            if lengths is not None:
                sizes = lengths[where]
                starts = (lengths.cumsum(0) - lengths)[where] - (sizes.cumsum(0) - sizes)
                places = torch.repeat_interleave(starts, sizes)
                places = places + torch.arange(len(places), device=places.device)
                lengths = sizes
            found[name] = {field: values[places] for field, values in fields.items()}, lengths
        return _Rows(found)

    def joined(self, other: "_Rows") -> "_Rows":
        found: dict[str, tuple[Mapping[str, Tensor], Tensor | None]] = {}
        for name, (fields, lengths) in self.columns.items():
            theirs, others = other.columns[name]
            both = {field: torch.cat((values, theirs[field])) for field, values in fields.items()}
            found[name] = both, None if lengths is None or others is None else torch.cat((lengths, others))
        return _Rows(found)

    def tensors(self) -> dict[str, Tensor]:
        """By their names: `NAME`, or `NAME.FIELD` of each field and `NAME.lengths`."""
        found: dict[str, Tensor] = {}
        for name, (fields, lengths) in self.columns.items():
            found |= {f"{name}.{field}" if field else name: values for field, values in fields.items()}
            found |= {} if lengths is None else {f"{name}.lengths": lengths}
        return {name: values.cpu().contiguous() for name, values in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "_Rows":
        """From what `tensors` gave."""
        found: dict[str, tuple[dict[str, Tensor], Tensor | None]] = {}
        for key, values in tensors.items():
            name, _, field = key.partition(".")
            fields, lengths = found.get(name, ({}, None))
            found[name] = (fields, values) if field == "lengths" else ({**fields, field: values}, lengths)
        return cls(found)


ROWS, SCORES = "rows", "scores"  # beside the columns that are kept


class Examples:
    """Of each sort, the rows of the highest scores; of equal ones those that come first in the split.

    Which they are is the same for any number of ranks, and of batches. What is kept stays on the device until the end.
    """

    def __init__(self, sorts: int, *, num: int = NUM_EXAMPLES) -> None:
        self._num = num
        self._kept: list[_Rows | None] = [None] * sorts

    def keep(self, sort: int, ids: RowIds, scores: Tensor, columns: Mapping[str, Value]) -> None:
        """Take in a batch: `scores` (B,), -inf of rows that are not of this sort; `ids` are the rows' numbers."""
        scores = torch.nan_to_num(scores.double(), nan=0.0, neginf=-torch.inf)
        rows = {ROWS: torch.from_numpy(ids).to(scores.device), SCORES: scores}
        places = _order(rows[SCORES], rows[ROWS])[: self._num]  # before columns are copied, which may be large
        new = _Rows({name: fields_of(value) for name, value in {**rows, **columns}.items()}).take(places)
        old = self._kept[sort]
        self._kept[sort] = new if old is None else self._chosen(old.joined(new))

    def _chosen(self, rows: _Rows) -> _Rows:
        (scores, _), (ids, _) = rows.columns[SCORES], rows.columns[ROWS]
        return rows.take(_order(scores[""], ids[""])[: self._num])

    def tensors(self, gather: Gather, device: torch.device) -> dict[str, Tensor]:
        """All of them, sort by sort, by `example_NAME`; none where there are no rows. Called by all ranks."""
        found: _Rows | None = None
        for kept in self._kept:
            # as bytes: a rank that had no rows does not know the columns
            content = torch.empty(0, dtype=torch.uint8)
            if kept is not None:
                content = torch.frombuffer(bytearray(save(kept.tensors())), dtype=torch.uint8)
            parts = [part.cpu() for part in gather(content.to(device))]
            best: _Rows | None = None
            for part in parts:
                if len(part):
                    rows = _Rows.of(load(part.numpy().tobytes()))
                    best = rows if best is None else best.joined(rows)
            if best is not None:
                best = self._chosen(best)
                best = best.take((best.columns[SCORES][0][""] > -torch.inf).nonzero()[:, 0])
                found = best if found is None else found.joined(best)
        if found is None or not len(found.columns[ROWS][0][""]):
            return {}
        return {f"example_{name}": values for name, values in found.tensors().items() if name != SCORES}


def _order(scores: Tensor, ids: Tensor) -> Tensor:
    """Places (n,) by falling scores, equal ones by rising ids."""
    by_id = ids.argsort(stable=True)
    return by_id[scores[by_id].argsort(descending=True, stable=True)]
