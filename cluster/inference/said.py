"""Said: what a model's outputs say of rows, as columns of a table: classes and how likely they are, numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.data.keys import RowIds
from cluster.data.layouts import Ragged
from cluster.data.sources.flat_trees import FlatTree, of_joins, spelled
from cluster.inference.rows import which
from cluster.runs.given_tables import INPUT, Piece
from cluster.runs.given_trees import words_of
from cluster.runs.predictor import Predictor
from nn_models.columns import Tree
from nn_models.evidence import confidence
from nn_models.parser import Parsed

Columns = dict[str, pa.Array]


def said(model: Predictor, piece: Piece, outputs: Sequence[Any], steps: Sequence[RowIds], *, top: int) -> pa.Table:
    """What the outputs of each step, whose rows stand at these places of the piece, say of the rows, in their order.

    Of a class a row: `prediction`, its `probability`, and `top` with `top_probability`, the likeliest ones, where more
    than one is asked for. Of a class for each element of a row these are lists; where what is said of the last one is
    said of the row (`Objective.last_says`) they are that one's, and those of all are `elements` and
    `element_probability`. Numbers are in the units of what was learned, a list where there are several. Of a parser's
    rows they are trees in brackets, or which parts were joined, in their order.
    """
    if isinstance(outputs[0], Parsed):
        return pa.table(which(piece) | {"prediction": _joins(model, piece, outputs)})
    whole = torch.cat([one.float() for one in outputs]).cpu()
    order = None if _in_order(steps) else np.argsort(np.concatenate(steps))
    if "elements" in model.recipe.model.gives & model.recipe.objective.takes:
        found = _of_elements(model, piece, whole, steps, order, top)
    else:
        whole = whole if order is None else whole[torch.from_numpy(order)]
        found = _classes(model, whole, top) if _names(model) or _counts(model, whole) else _numbers(model, whole)
    return pa.table(which(piece) | found)


def _in_order(steps: Sequence[RowIds]) -> bool:
    places = np.concatenate(steps)
    return bool((places == np.arange(len(places))).all())


def _names(model: Predictor) -> tuple[str, ...]:
    """Of what is predicted; a language model predicts what it reads."""
    column = model.manifest.columns[INPUT].column
    return model.classes or (getattr(column, "names", ()) if model.recipe.objective.writes else ())


def _counts(model: Predictor, outputs: Tensor) -> bool:
    """Whether outputs are scores of classes that have no names."""
    predicted = model.objective.predicted(outputs[:1])
    return isinstance(predicted, Tensor) and not predicted.is_floating_point()


def _classes(model: Predictor, outputs: Tensor, top: int) -> Columns:
    """Of outputs (n, C)."""
    names = _names(model)
    numbers, sure = (values.numpy() for values in confidence(outputs))
    found = {"prediction": _named(names, numbers), "probability": pa.array(sure, pa.float32())}
    if (most := min(top, outputs.shape[1])) > 1:
        likely, places = outputs.softmax(1).topk(most, 1)
        found["top"] = pa.FixedSizeListArray.from_arrays(_named(names, places.numpy().ravel()), most)
        found["top_probability"] = pa.FixedSizeListArray.from_arrays(pa.array(likely.numpy().ravel()), most)
    return found


def _named(names: Sequence[str], numbers: NDArray[Any]) -> pa.Array:
    """Classes by their names, or by their numbers where they have none."""
    return pa.array(names, pa.string()).take(pa.array(numbers)) if names else pa.array(numbers, pa.int64())


def _numbers(model: Predictor, outputs: Tensor) -> Columns:
    """Of outputs (rows, K), or (rows,), in their units."""
    values = model.scaling.inverse(model.of, outputs.reshape(len(outputs), -1).to(model.device)).cpu()
    flat, several = pa.array(values.flatten().numpy(), pa.float32()), values.shape[1] > 1
    return {"prediction": pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if several else flat}


def _of_elements(
    model: Predictor, piece: Piece, outputs: Tensor, steps: Sequence[RowIds], order: RowIds | None, top: int
) -> Columns:
    """Of outputs (elements of all rows, C), those of a row one after the other."""
    layout = piece.columns[INPUT]
    lengths = layout.lengths
    if lengths is None:
        lengths = np.full(len(piece), model.manifest.columns[INPUT].column.row_shape[0], np.int32)
    elements = Ragged.of({"scores": outputs.numpy()}, lengths[np.concatenate(steps)])
    if order is not None:
        elements = elements.take(order)
    last = model.objective.last_says
    found = _classes(model, torch.from_numpy(elements.fields["scores"][elements.offsets[1:] - 1]), top) if last else {}
    if last and model.recipe.objective.writes:  # of a text nobody asks what followed the words that it has
        return found
    numbers, sure = (values.numpy() for values in confidence(torch.from_numpy(elements.fields["scores"])))
    offsets = pa.array(elements.offsets, pa.int32())
    each, likely = ("elements", "element_probability") if last else ("prediction", "probability")
    found[each] = pa.ListArray.from_arrays(offsets, _named(_names(model), numbers))
    found[likely] = pa.ListArray.from_arrays(offsets, pa.array(sure, pa.float32()))
    return found


def _joins(model: Predictor, piece: Piece, outputs: Sequence[Parsed]) -> pa.Array:
    """Trees in brackets where the parts have names; else the pairs (first, second) of what was joined, in order."""
    pairs = [[pair for pair in row if pair[0] >= 0] for one in outputs for row in one.brackets.cpu().tolist()]
    column, layout = model.manifest.columns[INPUT].column, piece.columns[INPUT]
    if not isinstance(column, Tree) or not column.names or not isinstance(layout, Ragged):
        return pa.array(pairs, pa.list_(pa.list_(pa.int32(), 2)))
    texts = []
    for row, joins in enumerate(pairs):
        words = words_of(_tree(layout.take(slice(row, row + 1)), column.names))
        tree = of_joins(words, [(first, end) for first, end in joins])
        texts.append(spelled(tree.words, tree.children))
    return pa.array(texts, pa.string())


def _tree(row: Ragged, names: Sequence[str]) -> FlatTree:
    """One stored tree, with its words by their names."""
    words, children = (row.fields[name].tolist() for name in ("words", "children"))
    spelled_out = [names[word] if word >= 0 else None for word in words]
    return FlatTree(spelled_out, [tuple(child for child in below if child >= 0) for below in children], [])
