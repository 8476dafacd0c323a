"""Given: rows that a user has at hand, as they stand in files, laid as models are given them; or refused by name."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.data.layouts import Dense, Ragged, shared
from cluster.data.manifest import StoredColumn
from cluster.data.vocabulary import Vocabulary, told
from cluster.runs.given_trees import tree_rows
from nn_models.batch import Value
from nn_models.columns import Column, Tokens, Tree
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

MOST_OF_A_BYTE = 255


def as_stored(name: str, stored: StoredColumn, rows: Any, device: torch.device) -> Value:
    """Rows of one column, before they are scaled, on the device.

    Rows of one shape are an array or a tensor (rows, *shape) of any numeric type, or lists of numbers; those that
    differ in length a sequence with an array for each row, or a mapping of the column's fields where it has several.
    Words and classes may be given by their names, and a row of tokens as a text: what is not in the vocabulary is then
    counted and logged. What is laid already, as files are read, is taken as it is. Raises UserError for what the column
    cannot hold.
    """
    if isinstance(rows, Dense | Ragged):
        return rows.collate(stored.column, device)
    if stored.column.layout == "ragged":
        return laid(name, stored, rows).collate(stored.column, device)
    return dense(name, stored, rows).to(device)


def wanted(stored: StoredColumn) -> str:
    """What `as_stored` takes, for people."""
    column = stored.column
    if column.layout == "ragged":
        fields = column.ragged_fields()
        of = f"a mapping of {', '.join(fields)}" if len(fields) > 1 else "an array"
        text = ", or a text," * bool(getattr(column, "unit", None))
        text = ", or brackets such as ((It works) .)," if isinstance(column, Tree) else text
        return f"a list with {of}{text} for each row"
    shape = ", ".join(map(str, column.row_shape))
    as_bytes = f", bytes 0 to {MOST_OF_A_BYTE}" if stored.dtype == "uint8" else ""
    units = ", in the units of the file" if column.scaled and stored.dtype != "uint8" else ""
    return f"(rows{', ' * bool(shape)}{shape}){as_bytes}{units}"


def dense(name: str, stored: StoredColumn, rows: Any) -> Tensor:
    """Rows of one shape: bytes as they are, other numbers in the column's type."""
    values = rows if isinstance(rows, Tensor) else shared(_numbers(name, stored, rows))
    shape = stored.column.row_shape
    if values.is_complex() or tuple(values.shape[1:]) != shape or values.dim() != len(shape) + 1:
        one = tuple(values.shape) == shape
        raise UserError(
            name,
            f"of shape {tuple(values.shape)}, where the model takes {wanted(stored)}",
            "give a batch of it: rows[None]" if one else "bring the rows into this shape",
        )
    if stored.dtype != "uint8":
        return values.to(getattr(torch, stored.dtype))
    if values.dtype == torch.uint8:
        return values
    values = values.float()
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if low < 0 or high > MOST_OF_A_BYTE:
        raise UserError(
            name, f"values from {low:g} to {high:g} are no bytes", f"give {wanted(stored)}: scaling is the model's part"
        )
    if high <= 1 and bool((values != values.round()).any()):
        raise UserError(
            name, "values from 0 to 1 are pixels that were divided already", f"give {wanted(stored)}; times 255"
        )
    return values


def laid(name: str, stored: StoredColumn, rows: Sequence[Any]) -> Ragged:
    """Rows that differ in length, as they are stored: see `as_stored`."""
    column, fields = stored.column, stored.column.ragged_fields()
    found: dict[str, list[NDArray[Any]]] = {field: [] for field in fields}
    lengths = []
    for row in _spelled_out(name, column, rows):
        named = row if isinstance(row, Mapping) else dict.fromkeys(list(fields)[:1], row)
        if set(named) != set(fields):
            raise UserError(
                name, f"a row has {', '.join(named)}, and not {', '.join(fields)}", f"give {wanted(stored)}"
            )
        arrays = {field: _numbers(name, stored, values) for field, values in named.items()}
        for field, values in arrays.items():
            shape = fields[field].shape
            values = values.reshape(-1, *shape) if not values.size else values
            if values.shape[1:] != shape or len(values) != len(next(iter(arrays.values()))):
                raise UserError(name, f"a row's {field} of shape {values.shape}", f"give {wanted(stored)}")
            found[field].append(values.astype(fields[field].dtype))
        lengths.append(len(next(iter(arrays.values()))))
    whole = {
        field: np.concatenate([np.empty((0, *described.shape), described.dtype), *found[field]])
        for field, described in fields.items()
    }
    return Ragged.of(whole, lengths)


def _spelled_out(name: str, column: Column, rows: Sequence[Any]) -> Sequence[Any]:
    """The rows, where those that are texts, trees in brackets, or lists of words are given by their numbers."""
    if isinstance(column, Tree):
        return tree_rows(name, column, rows)
    if not isinstance(column, Tokens) or not column.unit or not column.names:
        return rows
    vocabulary, unknown, num_unknown = Vocabulary.of_column(column), list[str](), 0
    found = []
    for row in rows:
        words = row if isinstance(row, str) else _words(row)
        if words is not None:
            row = vocabulary.numbers(words, path=name)
            if strange := vocabulary.unknown(words):
                unknown += strange
                num_unknown += int((row == column.unknown_token).sum())
        found.append(row)
    if num_unknown:
        logger.warning(
            "%s: %d tokens are not in the vocabulary: %s", name, num_unknown, told([*dict.fromkeys(unknown)])
        )
    return found


def _words(row: Any) -> list[str] | None:
    """A row that is a list of words; None for one of numbers."""
    values = row.tolist() if isinstance(row, np.ndarray) else row
    return [*values] if isinstance(values, list | tuple) and values and isinstance(values[0], str) else None


def _numbers(name: str, stored: StoredColumn, values: Any) -> NDArray[Any]:
    """An array of numbers, where names of words or classes are given the numbers of these."""
    try:
        array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except ValueError as error:  # rows of different lengths
        raise UserError(name, f"no array ({error})", f"give {wanted(stored)}") from None
    names = getattr(stored.column, "names", ())
    if array.dtype.kind == "U" and names:
        known = {word: number for number, word in enumerate(names)}
        if unknown := sorted({word for word in array.ravel().tolist() if word not in known}):
            raise UserError(name, f"{unknown[0]!r} is none of its {len(known)} names", f"such as {names[0]!r}")
        return np.vectorize(known.__getitem__, otypes=[np.int64])(array)
    if array.dtype.kind not in "buif":
        raise UserError(name, f"an array of {array.dtype}, no numbers", f"give {wanted(stored)}")
    return array
