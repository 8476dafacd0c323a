"""Served: a run's model as requests meet it: it checks the rows of each, and answers those of many in one pass."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cluster.data.vocabulary import Vocabulary
from cluster.runs.coder import Coder
from cluster.runs.given import dense, wanted
from cluster.runs.opened import Forecaster, Generator, Parser, Writer, open_model
from cluster.runs.predictor import OpenedModel, Predictor
from nn_models.columns import Column, Features, Image, Label, Labels, Tokens, Tree
from nn_models.columns import Sequence as Steps
from nn_models.errors import UserError

ROWS = "rows"  # as a request's body calls them
MOST_ELEMENTS = 20_000  # words or steps of a row: recurrent nets take them one after the other
MOST_TOLD = 5  # of the likeliest classes

Rows = Tensor | list[Any]  # of one request, checked: of one shape, or each as it came
Answer = dict[str, Any]  # to one row


class Served:
    """A run's model that answers rows. `run` is where it is.

    Raises UserError where the run has no model, or one whose use is another command's.
    """

    def __init__(self, run: str, *, device: torch.device | str | None = None) -> None:
        self.run = run
        self.model = _servable(run, open_model(run, device=device))
        self._stored = self.model.manifest.columns["input"]
        self.column: Column = self._stored.column

    @property
    def takes_images(self) -> bool:
        """Whether an encoded picture is one of its rows."""
        return isinstance(self.column, Image) and self._stored.dtype == "uint8" and self.column.shape[0] in (1, 3)

    @property
    def takes_texts(self) -> bool:
        """Whether a text is one of its rows."""
        texts = isinstance(self.column, Tokens) and bool(self.column.unit and self.column.names)
        return texts or isinstance(self.column, Tree)

    def described(self) -> dict[str, Any]:
        """What it is, takes and gives, as JSON can hold it."""
        model = self.model
        return {
            "run": self.run,
            "name": model.recipe.name,
            "model": model.recipe.model.kind,
            "input": self.column.kind,
            "shape": list(self.column.row_shape),
            "takes": model.takes["input"],
            "gives": model.gives,
            "classes": list(model.classes),
            "images": self.takes_images,
            "texts": self.takes_texts,
        }

    def checked(self, rows: Any) -> Rows:
        """The rows of one request, as the model can be given them beside those of others.

        Raises UserError for what is no list of rows, and for rows that the model cannot read.
        """
        if not isinstance(rows, list | Tensor) or not len(rows):
            fix = f"give {wanted(self._stored)}" if self._stored.column.layout == "dense" else "give a list of them"
            raise UserError(ROWS, "no list of rows" if rows or not isinstance(rows, list) else "an empty list", fix)
        if isinstance(self.model, Forecaster):
            return [self._series(row) for row in rows]
        if isinstance(self.column, Tokens):
            return [self._tokens(row) for row in rows]
        if isinstance(self.column, Tree):
            return [_text(row) for row in rows]
        if self.column.layout == "ragged":
            return [self._steps(row) for row in rows]
        values = dense(ROWS, self._stored, rows if isinstance(rows, Tensor) else _same_length(rows))
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise UserError(ROWS, "numbers beyond those of float32", "give smaller ones")
        return values

    @torch.no_grad()
    def answers(self, requests: Sequence[Rows]) -> list[list[Answer] | UserError]:
        """To the rows of each of some requests, all of them in one pass; an error where its rows cannot be read."""
        try:
            answers = iter(self._answers(_joined(requests)))
            return [[next(answers) for _ in rows] for rows in requests]
        except UserError as error:
            if len(requests) == 1:
                return [error]
        return [self.answers([rows])[0] for rows in requests]  # whose rows they are

    # -- all rows of a batch ---------------------------------------------------------------------------------------

    def _answers(self, rows: Rows) -> list[Answer]:
        model = self.model
        if isinstance(model, Parser):
            return [{"tree": tree} for tree in model.predict(rows)]
        if isinstance(model, Forecaster):
            ahead = model.ahead
            return [
                {"columns": ahead.names, "steps": steps} for steps in model.forecast(torch.stack(list(rows))).tolist()
            ]
        target = model.manifest.signature.columns.get("target")
        if isinstance(target, Labels):  # of rows that differ in length the outputs have no bounds
            return [self._elements(rows[place : place + 1]) for place in range(len(rows))]
        outputs = model(rows)
        if isinstance(target, Label) and isinstance(outputs, Tensor) and outputs.dim() == 2:
            return self._classes(outputs)
        return [{"values": values} for values in outputs.flatten(1).tolist()]

    def _classes(self, outputs: Tensor) -> list[Answer]:
        chances = outputs.float().softmax(1)
        predicted = self.model.objective.predicted(outputs).to(chances.device)
        sure = chances.gather(1, predicted[:, None])[:, 0].tolist()
        most = min(MOST_TOLD, chances.shape[1])
        values, places = (found.tolist() for found in chances.topk(most, dim=1))
        names = self._names(chances.shape[1])
        return [
            {
                "class": names[number],
                "probability": chance,
                "top": [{"class": names[place], "probability": value} for place, value in zip(at, of, strict=True)],
            }
            for number, chance, at, of in zip(predicted.tolist(), sure, places, values, strict=True)
        ]

    def _elements(self, row: Rows) -> Answer:
        outputs = self.model(row)
        predicted = self.model.objective.predicted(outputs).to(outputs.device)
        sure = outputs.float().softmax(1).gather(1, predicted[:, None])[:, 0].tolist()
        names = self._names(outputs.shape[1])
        return {"classes": [names[number] for number in predicted.tolist()], "probabilities": sure}

    def _names(self, size: int) -> Sequence[str]:
        return self.model.classes or [str(number) for number in range(size)]

    # -- one row -----------------------------------------------------------------------------------------------------

    def _tokens(self, row: Any) -> Any:
        column = cast(Tokens, self.column)
        words = isinstance(row, list) and bool(row) and all(isinstance(word, str) for word in row)
        if self.takes_texts and (isinstance(row, str) or words):
            numbers = Vocabulary.of_column(column).numbers(row, path=ROWS)
        else:
            numbers = _array(row, "a text, a list of words, or their numbers" if self.takes_texts else "numbers")
            if numbers.dtype.kind != "i" or numbers.ndim != 1 or ((numbers < 0) | (numbers >= column.size)).any():
                raise UserError(ROWS, "what are no tokens", f"give whole numbers from 0 to {column.size - 1}")
        _check_length(numbers, column.length)
        return numbers.astype(np.int32)

    def _steps(self, row: Any) -> Any:
        width = cast(Steps, self.column).width
        steps = _float32(row, f"a list of steps of {width} numbers")
        if steps.ndim != 2 or steps.shape[1] != width or not np.isfinite(steps).all():
            raise UserError(ROWS, f"a row of shape {steps.shape}", f"give a list of steps of {width} numbers each")
        _check_length(steps, None)
        return steps

    def _series(self, row: Any) -> Any:
        forecaster = cast(Forecaster, self.model)
        columns, window = forecaster.ahead.columns, forecaster.window
        what = f"at least {window} steps of {', '.join(columns)}"
        steps = torch.from_numpy(_float32(row, what))
        if steps.dim() != 2 or steps.shape[1] != len(columns) or len(steps) < window:
            raise UserError(
                ROWS, f"a row of shape {tuple(steps.shape)}, where the model reads {what}", "give that many"
            )
        if not bool(steps.isfinite().all()):
            raise UserError(ROWS, "numbers beyond those of float32", "give smaller ones")
        return steps[-window:]


def _servable(run: str, model: OpenedModel) -> Predictor:
    """The model, where it answers rows. Raises UserError with what to use instead."""
    kind = model.recipe.model.kind
    if isinstance(model, Generator):
        raise UserError(run, f"its model, a {kind}, makes rows and answers none", f"use manta generate {run}")
    if isinstance(model, Writer):
        raise UserError(run, f"its model, a {kind}, goes on with a text", f"use manta generate {run}")
    if isinstance(model, Coder):
        raise UserError(
            run, f"its model, a {kind}, makes codes of rows", f"use manta encode {run} or manta detect {run}"
        )
    assert isinstance(model, Predictor)
    column = model.manifest.signature["input"]
    if len(model.reads) > 1 or not isinstance(column, Features | Image | Steps | Tokens | Tree):
        rows = f"rows of {' and '.join(model.reads)}" if len(model.reads) > 1 else f"{column.kind} rows"
        raise UserError(run, f"its model reads {rows}, which no request can hold", "use cluster.open_model in Python")
    return model


def _joined(requests: Sequence[Rows]) -> Rows:
    if isinstance(requests[0], Tensor):
        return torch.cat(cast(list[Tensor], list(requests)))
    return [row for rows in requests for row in rows]


def _same_length(rows: list[Any]) -> Any:
    try:
        array = np.asarray(rows)
    except ValueError:
        raise UserError(ROWS, "rows of different shapes", "give all of one") from None
    except OverflowError:
        raise UserError(ROWS, "numbers beyond those of 64 bits", "give smaller ones") from None
    if array.dtype.kind not in "uif":
        raise UserError(ROWS, "what are no numbers", "give lists of numbers")
    return array


def _array(row: Any, what: str) -> Any:
    array = _same_length(row) if isinstance(row, list) else None
    if array is None or not array.size:
        raise UserError(ROWS, "an empty row" if row in ([], "") else "a row that is no list", f"give {what}")
    return array


def _float32(row: Any, what: str) -> Any:
    with np.errstate(over="ignore"):  # what is too large is infinite then, and refused
        return _array(row, what).astype(np.float32)


def _text(row: Any) -> str:
    if not isinstance(row, str) or not row.strip():
        raise UserError(ROWS, "a row without words", "give texts")
    if len(row) > MOST_ELEMENTS:
        raise UserError(ROWS, f"a text of {len(row):,} characters", f"give at most {MOST_ELEMENTS:,}")
    return row


def _check_length(row: Any, length: int | None) -> None:
    if not len(row):
        raise UserError(ROWS, "a row without words", "give some")
    if length is not None and len(row) != length:
        raise UserError(ROWS, f"a row of {len(row)}, where the model reads {length}", f"give {length}")
    if len(row) > MOST_ELEMENTS:
        raise UserError(ROWS, f"a row of {len(row):,}", f"give at most {MOST_ELEMENTS:,}")
