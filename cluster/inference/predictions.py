"""Predictions: what a run's model says of rows, part by part; and the figures of those that have labels.

Rows are computed EVALUATION_ROWS at once from the beginning of a part, in any process: the same rows give the same
numbers wherever they are computed, and a split's those that `evaluate` has.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cluster.data.keys import RowIds
from cluster.data.layouts import Layout
from cluster.data.loader import Reading
from cluster.data.manifest import SPLITS
from cluster.data.order import StreamOrder
from cluster.data.sources.base import DataSpec, Part
from cluster.inference.rows import PartedRows, rows_of
from cluster.inference.said import said
from cluster.runs.given_files import GivenFiles, GivenTexts
from cluster.runs.given_tables import TARGET, Piece, numbered
from cluster.runs.opened import Generator, open_model
from cluster.runs.predictor import Predictor
from cluster.storage import Folder
from cluster.training.carry import of_rows
from cluster.training.checkpoints import WEIGHTS
from cluster.training.evaluation import Totals, autocast, names_of
from cluster.training.journal import prefixed
from cluster.training.run_directory import RECIPE, jsonable
from cluster.training.splits import EVALUATION_ROWS
from nn_models.batch import Batch, Place
from nn_models.columns import Label
from nn_models.errors import UserError
from nn_models.objectives import Measured, only_here

UNKNOWN_ROWS = 1 << 62  # of standard input: figures then gather nothing that grows with the rows
ALL = "all"  # before the names of figures, where they are of no single split


def opened_predictor(run: str, *, device: torch.device | None = None) -> Predictor:
    """The run's model. Raises UserError for one that predicts nothing of rows, saying what it is used with."""
    model = open_model(run, device=device)
    kind = model.recipe.model.kind
    if isinstance(model, Generator):
        raise UserError(run, f"{kind} makes rows, and predicts nothing of any", f"use `manta generate {run}`")
    if not isinstance(model, Predictor) or model.recipe.model.gives & {"reconstruction", "posterior"}:
        fix = f"use `manta encode {run}` for codes of rows, or `manta detect {run}` for those that come back worst"
        raise UserError(run, f"{kind} gives rows again, and predicts nothing of them", fix)
    return model


@dataclass(frozen=True)
class Counted:
    """What a batch of labelled rows counts, and its sums; what figures of all rows need are its outputs and targets."""

    weight: float
    measured: Measured
    ids: RowIds
    target: Any


@dataclass(frozen=True)
class Found:
    """What is said of some rows, and of labelled ones what figures are made of."""

    table: pa.Table
    counted: tuple[Counted, ...] = ()


class Predicting:
    """A model that is used on rows, part by part. It can be pickled."""

    def __init__(self, model: Predictor, rows: PartedRows, *, top: int, gather: bool) -> None:
        """`top` likeliest classes are named of each row; `gather` keeps what figures of all rows need."""
        self.model, self.rows, self.top, self._gather = model, rows, top, gather
        # windows of a text follow each other; what a user gives stands for itself
        self._streams = model.manifest.order == "streams" and not isinstance(rows, GivenFiles | GivenTexts)

    def found(self, part: Part) -> Iterator[Found]:
        """What is said of a part's rows, piece by piece, in their order."""
        pieces = self.rows.read(part)
        for piece in [_joined([*pieces])] if self._streams else pieces:
            steps = [*self._steps(len(piece))]
            outputs, counted = self._computed(piece, steps)
            yield Found(said(self.model, piece, outputs, steps, top=self.top), tuple(counted))

    def _steps(self, rows: int) -> Iterator[RowIds]:
        """The places of the rows that are computed at once."""
        if self._streams:
            order = StreamOrder(rows, num_streams=self.model.recipe.train.global_batch_size)
            yield from (order.rows(0, step, 0, 1) for step in range(order.num_steps))
        else:
            places = np.arange(rows)
            yield from (places[first : first + EVALUATION_ROWS] for first in range(0, rows, EVALUATION_ROWS))

    @torch.no_grad()
    def _computed(self, piece: Piece, steps: Sequence[RowIds]) -> tuple[list[Any], list[Counted]]:
        """The net's outputs of each step, and what its rows count where they have labels."""
        net, objective, device = self.model.net, self.model.objective, self.model.device
        reading, columns = self._reading(piece.split), self._columns(piece)
        labelled = self.rows.labelled and set(self.model.recipe.objective.reads) <= set(columns)
        found, counted, carry = [], list[Counted](), None
        for places in steps:
            batch = self._batch(reading, columns, places, piece.ids)
            with autocast(self.model.recipe.train.precision, device):
                if not labelled:
                    found.append(objective.outputs(net, batch))
                    continue
                measured = objective.measure(net, batch, carry=of_rows(carry, 0, len(places)), across=only_here)
                outputs = measured.outputs  # a language model keeps none
                found.append(objective.outputs(net, batch) if outputs is None else outputs)
            carry = measured.carry if self._streams else None
            kept = measured._replace(carry=None, outputs=outputs if self._gather else None)
            target = batch[TARGET] if self._gather else None
            counted.append(Counted(self._weight(columns, places), kept, batch.place.ids, target))
        return found, counted

    def _columns(self, piece: Piece) -> dict[str, Layout]:
        """The columns as stored, with the classes by their numbers."""
        columns, target = dict(piece.columns), self.model.manifest.columns.get(TARGET)
        named = self.rows.labelled and piece.labels is not None and TARGET not in columns
        if named and target is not None and isinstance(target.column, Label):
            columns[TARGET] = numbered(cast(Any, piece.labels), target, "DATA")
        return columns

    def _batch(self, reading: Reading, columns: dict[str, Layout], places: RowIds, ids: RowIds) -> Batch:
        manifest, device = self.model.manifest, self.model.device
        where = slice(int(places[0]), int(places[-1]) + 1) if len(places) == places[-1] - places[0] + 1 else places
        stored = {
            name: layout.take(where).collate(manifest.columns[name].column, device) for name, layout in columns.items()
        }
        place = Place.of(len(places))._replace(ids=ids[where])
        return reading.batch(stored, place, place.ids, 0)

    def _reading(self, split: str | None) -> Reading:
        model, recipe = self.model, self.model.recipe
        return Reading(
            model.manifest,
            model.device,
            names=[name for name in recipe.columns if name in model.manifest.columns],
            scale=recipe.scale,
            seed=recipe.train.seed,
            split=SPLITS.index(split) if split in SPLITS else 0,
        )

    def _weight(self, columns: dict[str, Layout], places: RowIds) -> float:
        """What these rows count in the loss: see Splits."""
        name = self.model.recipe.objective.counts
        if name is None:
            return len(places)
        lengths = columns[name].lengths
        if lengths is None:
            return len(places) * self.model.manifest.signature[name].row_shape[0]
        return int(lengths[places].sum())


def _joined(pieces: list[Piece]) -> Piece:
    """One piece of all rows, which are of one split."""
    first, *others = pieces
    if not others:
        return first
    columns = {name: layout.joined([other.columns[name] for other in others]) for name, layout in first.columns.items()}
    return Piece(np.concatenate([piece.ids for piece in pieces]), columns, None, first.split)


class Tally:
    """The figures of labelled rows, as `evaluate` has them, from what was counted of them batch by batch, in order."""

    def __init__(self, model: Predictor, num_rows: int) -> None:
        objective = model.objective
        self._names = names_of(objective)
        self._figures = objective.figures(model.manifest.signature, num_rows=num_rows)
        self._device = torch.device("cpu")
        self._totals = Totals(len(objective.metrics), self._device)
        self._rows = 0

    @property
    def gathers(self) -> bool:
        """Whether there are figures of all rows together."""
        return self._figures is not None

    def add(self, counted: Iterable[Counted]) -> None:
        """Take in some batches."""
        for one in counted:
            cpu = one.measured._replace(
                loss=one.measured.loss.cpu(),
                sums=one.measured.sums.cpu(),
                counts=None if one.measured.counts is None else one.measured.counts.cpu(),
            )
            self._totals.add(one.weight, cpu)
            if self._figures is not None:
                # places among all rows that were given, whatever their splits
                place = Place.of(len(one.ids))._replace(ids=np.arange(self._rows, self._rows + len(one.ids)))
                batch = Batch({TARGET: one.target.cpu()}, place, lambda: torch.empty(0))
                self._figures.add(batch, one.measured.outputs.cpu())
            self._rows += len(one.ids)

    def metrics(self, split: str) -> dict[str, float | None]:
        """By name, such as `test/accuracy`; none where no row had labels."""
        if not self._rows:
            return {}
        found = dict(zip(self._names, self._totals.means(only_here), strict=True))
        found |= self._figures.values(only_here, self._device) if self._figures is not None else {}
        return cast(dict[str, float | None], jsonable(prefixed(split, found)))


class Prediction:
    """Rows that are predicted once, part by part; then the figures of all of them."""

    def __init__(
        self,
        run: str,
        data: DataSpec | str | Sequence[str] | None = None,
        *,
        splits: Sequence[str] = (),
        label: str | None = None,
        labelled: bool = True,
        resize: bool = False,
        top: int = 5,
        device: torch.device | None = None,
    ) -> None:
        """See `rows_of` for the data; by default the test split of the run's own.

        Raises UserError for a run whose model predicts nothing of rows, and for rows that do not fit it.
        """
        self.model = opened_predictor(run, device=device)
        recipe, manifest = self.model.recipe, self.model.manifest
        if data is None and not splits:
            splits = ("test",)
        read = tuple(name for name in manifest.columns if name in recipe.columns)
        used = rows_of(self.model, data, splits=splits, label=label, labelled=labelled, resize=resize, columns=read)
        if used.labelled and used.classes and used.classes != self.model.classes:
            theirs, ours = (", ".join(names[:5]) for names in (used.classes, self.model.classes))
            what = f"the classes of the rows ({theirs}, …) are not those of the model ({ours}, …)"
            raise UserError("DATA", what, "predict without labels: --unlabelled")
        self.rows = used.rows
        self._options = {"top": top, "label": label, "labelled": labelled, "resize": resize, "splits": list(splits)}
        self._run = Folder(run)
        self.split = splits[0] if len(splits) == 1 else ALL
        known = sum(part.rows for part in self.rows.parts)
        self.tally = Tally(self.model, known if all(part.rows for part in self.rows.parts) else UNKNOWN_ROWS)
        self.predicting = Predicting(self.model, self.rows, top=top, gather=self.tally.gathers)

    @property
    def streamed(self) -> bool:
        """Whether the rows come once, from standard input."""
        return isinstance(self.rows, GivenFiles) and self.rows.streamed

    @property
    def described(self) -> dict[str, Any]:
        """What decides what is predicted: the model, the rows and their parts, the options."""
        model = [hashlib.sha256(self._run.read_bytes(f"model/{name}")).hexdigest() for name in (WEIGHTS, RECIPE)]
        parts = [part.rows for part in self.rows.parts]
        return {"model": model, "rows": self.rows.fingerprint, "parts": parts, "options": self._options}

    def tables(self) -> Iterator[pa.Table]:
        """Tables of the rows as they come: split, row, file and label as there are some, prediction, probability, …."""
        for part in self.rows.parts:
            for found in self.predicting.found(part):
                self.tally.add(found.counted)
                yield found.table

    def metrics(self) -> dict[str, float | None]:
        """Of all rows, once the tables are through, where they have labels: as `evaluate` has them."""
        return self.tally.metrics(self.split)


def ids_of(table: pa.Table) -> NDArray[np.int64]:
    """The rows' numbers."""
    return cast(NDArray[np.int64], table["row"].to_numpy())
