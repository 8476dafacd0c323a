"""encode: the codes of rows, by a run's autoencoder, from RUN/model alone; streamed, in this process."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from cluster.data.sources.base import DataSpec
from cluster.inference.rows import Piece, rows_of, told, which
from cluster.runs.coder import Coder
from cluster.runs.opened import open_model
from nn_models.errors import UserError


def opened_coder(run: str, *, device: torch.device | None = None) -> Coder:
    """The autoencoder of a run. Raises UserError where its model is none."""
    model = open_model(run, device=device)
    if not isinstance(model, Coder):
        raise UserError(run, f"a {model.recipe.model.kind}, which makes no codes", "give the run of an autoencoder")
    return model


def encode(
    run: str,
    *,
    data: DataSpec | str | None = None,
    splits: Sequence[str] = (),
    label: str | None = None,
    device: torch.device | None = None,
) -> Iterator[pa.Table]:
    """Tables of rows, as they come: `split` where the data has several, `row`, `label` where there are some, `code`.

    `row` counts from 0 in its split, or in the data as it is. `code` is a list of K numbers, float32. For `data` and
    `splits` see `rows_of`. Raises UserError for a run without codes, and for rows that do not fit.
    """
    model = opened_coder(run, device=device)
    used = rows_of(model, data, splits=splits, label=label)
    return (_table(model, piece) for piece in used.pieces)


def _table(model: Coder, piece: Piece) -> pa.Table:
    codes = model.encode(piece.input, **told(model, model.told, piece)).cpu().numpy()
    values = pa.array(np.ascontiguousarray(codes).ravel(), pa.float32())
    columns = which(piece) | {"code": pa.FixedSizeListArray.from_arrays(values, model.num_codes)}
    return pa.table(columns)
