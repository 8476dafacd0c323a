"""What a run's best generator, or its variational autoencoder, makes; from RUN/model alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.adversarial.halves import described
from cluster.adversarial.quality import read_rows
from cluster.data.prepare import prepared
from cluster.inference.rows import Piece, rows_of, told
from cluster.runs.coder import Coder
from cluster.runs.opened import Generator, open_model
from nn_models.errors import UserError


@dataclass(frozen=True)
class Generated:
    """Rows that a model made: (rows, *input_shape), images in [-1, 1]; also the images that they go by.

    Of a path between two rows the first and the last are these rows as the model gives them again.
    """

    made: Tensor
    given: Tensor | None = None  # the images they were made from
    true: Tensor | None = None  # and those they should be
    num_classes: int | None = None  # where labels are given: so many come in turn
    path: bool = False  # from one row to another


def generate(
    run: str,
    *,
    num: int,
    label: str | None = None,
    seed: int = 0,
    between: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Generated:
    """`num` rows that the best generator of a run makes, or its variational autoencoder of codes from the prior.

    `label` is the class that a conditional model shall make, by name or number; without one all classes come in turn.
    Models that start from an image are given the first ones of the test split. `between` are the numbers of two test
    rows: an autoencoder makes rows of the codes on the straight line from the one's to the other's. Raises UserError
    where the run has no generator, no such class or row, or too few images to start from, or where the rows would take
    too much memory.
    """
    model = open_model(run, device=device)
    if isinstance(model, Coder):
        return _coded(run, model, num, label=label, seed=seed, between=between)
    if between is not None:
        raise UserError("--between", f"{model.recipe.model.kind} has no codes of rows", "give an autoencoder's run")
    if not isinstance(model, Generator):
        raise UserError(
            run,
            f"a {model.recipe.model.kind}, which generates nothing",
            "give the run of a GAN or of a variational autoencoder",
        )
    condition = true = num_classes = None
    if model.starts and label is None:
        condition, true = _pairs(run, model, num)
    elif model.given is not None and label is None:
        num_classes = model.given.column.num_outputs
    made = model.made(num, label=label, condition=condition, seed=seed, path="--")
    return Generated(made, condition, true, num_classes)


def _coded(
    run: str, model: Coder, num: int, *, label: str | None, seed: int, between: Sequence[int] | None
) -> Generated:
    """Rows of codes: from the prior, or on the line between those of two rows."""
    if between is not None:
        return Generated(_shown(model, _between(run, model, num, between, label=label)), path=True)
    if not model.has_prior:
        raise UserError(
            run,
            f"a {model.recipe.model.kind}, whose codes have no distribution to draw from",
            "say --between which two rows to go, or give the run of a variational autoencoder",
        )
    made = model.drawn(num, label=label, seed=seed, path="--")
    in_turn = model.manifest.signature.num_outputs if model.told and label is None else None
    return Generated(_shown(model, made), num_classes=in_turn)


def _between(run: str, model: Coder, num: int, between: Sequence[int], *, label: str | None) -> Tensor:
    first, last = between
    if num < 2:
        raise UserError("--num", f"{num} rows, but a path has two ends", "ask for 2 or more")
    used = rows_of(model, None, splits=("test",))
    found: dict[int, Piece] = {}
    total = 0
    for piece in used.pieces:
        for row in {first, last} - set(found):
            where = np.flatnonzero(piece.ids == row)
            if len(where):
                found[row] = piece.at(where)
        total += len(piece)
        if {first, last} <= set(found):
            break
    for row in (first, last):
        if row not in found:
            raise UserError("--between", f"no row {row} in the test split", f"choose two of 0 to {total - 1:,}")
    ends = torch.cat([model.encode(end.input, **told(model, model.told, end)) for end in (found[first], found[last])])
    weight = torch.linspace(0, 1, num, device=ends.device)[:, None]
    codes = torch.lerp(ends[:1], ends[1:], weight)
    if not model.told or label is not None:
        return model.decode(codes, **model.classes_told(num, label=label, path="--"))
    # told of a class, the path is that of the first row's
    classes = found[first].labels
    assert classes is not None  # `told` has seen to it
    return model.decode(codes, **model.classes_told(num, label=str(classes[0])))


def _shown(model: Coder, rows: Tensor) -> Tensor:
    """Rows in the units of the files, bytes as -1 to 1; on the CPU."""
    stored = model.manifest.columns["input"]
    return rows.cpu() / 127.5 - 1 if stored.dtype == "uint8" else rows.cpu()


def _pairs(run: str, model: Generator, num: int) -> tuple[Tensor, Tensor]:
    """The first rows to start from of the recipe's data, and those that they are to become."""
    recipe, trained_on = model.recipe, model.manifest.signature
    data, name = prepared(recipe.data), described(recipe)[0].given
    assert name is not None
    if any(data.manifest.signature.columns.get(column) != trained_on[column] for column in ("input", name)):
        raise UserError(run, f"{recipe.data.kind} no longer holds pairs of the size that this run was trained on")
    split = "test" if data.manifest.rows("test") else "validation"
    if num > data.manifest.rows(split):
        raise UserError(
            "--num", f"{num} images, but the {split} split has only {data.manifest.rows(split)} to start from"
        )
    rows = read_rows(data, split, num, recipe=recipe)
    return rows[name], rows["input"]
