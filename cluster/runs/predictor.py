"""Predictor: a trained net with all that stands between it and the files."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cluster.data.keys import row_keys
from cluster.data.layouts import Dense, Ragged
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.scaling import Scaling
from cluster.recipe.recipe import Recipe
from cluster.runs.given import as_stored, wanted
from cluster.runs.given_files import GivenFiles, as_paths
from cluster.training.carry import joined
from cluster.training.checkpoints import SavedModel
from cluster.training.evaluation import autocast
from cluster.training.splits import EVALUATION_ROWS
from nn_models.batch import Batch, Place, Value
from nn_models.errors import UserError, did_you_mean
from nn_models.objectives import Objective

MOST_NUMBERS = 100_000_000  # that are made at once: 400 MB


class OpenedModel(nn.Module):
    """A trained net with all that stands between it and the files: `net` is the bare one.

    `net` reads numbers that are scaled as in training, which `scaled` makes of rows; `classes` has the names of what is
    predicted, in the order of the outputs. It can be moved with `to`, and is in evaluation mode.
    """

    net: nn.Module

    def __init__(self, net: nn.Module, recipe: Recipe, saved: SavedModel) -> None:
        super().__init__()
        self.net = net
        self.recipe: Recipe = recipe
        self.manifest: Manifest = saved.manifest
        self.best: Mapping[str, Any] = saved.best
        self._scalings: dict[torch.device, Scaling] = {}
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((tensor.device for tensor in self.net.parameters()), torch.device("cpu"))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what is predicted; none of numbers."""
        return self.manifest.class_names

    @property
    def scaling(self) -> Scaling:
        """Between numbers as they are stored and at the scale that the net reads and gives."""
        if self.device not in self._scalings:
            columns = {name: self._column(name) for name in self.recipe.columns if name in self.manifest.columns}
            self._scalings[self.device] = Scaling(columns, self.recipe.scale, self.device)
        return self._scalings[self.device]

    def _column(self, name: str) -> StoredColumn:
        return self.manifest.columns[name]

    @property
    @abstractmethod
    def gives(self) -> str:
        """What it gives, for people."""

    @property
    @abstractmethod
    def takes(self) -> Mapping[str, str]:
        """What it takes, for people: by the names of its arguments."""

    def __repr__(self) -> str:
        epoch = f" of epoch {self.best['epoch']}" if self.best.get("step") else ", untrained"
        takes = "; ".join(f"{name}: {what}" for name, what in self.takes.items())
        return (
            f"{self.recipe.name}: {self.recipe.model.kind}{epoch}, on {self.device}\n"
            f"takes  {takes}\ngives  {self.gives}\nnet    {type(self.net).__name__}, which reads scaled numbers"
        )


class Predictor(OpenedModel):
    """Called with rows it gives the net's outputs: scores of the classes (logits), or numbers in the target's units.

    `predict` gives names of classes, or these numbers. Rows are as `cluster.runs.given.as_stored` takes them;
    columns beside the input, where the model reads any, are given by their names.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, saved: SavedModel) -> None:
        super().__init__(net, recipe, saved)
        self.objective = cast(Objective, recipe.objective.build(saved.manifest.signature))
        # what outputs are numbers of: the rows themselves, or what is predicted of them
        self.of = "input" if recipe.model.gives & {"reconstruction", "posterior"} else "target"

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that the net reads."""
        return ("input", *(name for name in self.recipe.model.reads if name != "input"))

    @property
    def takes(self) -> Mapping[str, str]:
        """See OpenedModel."""
        return {name: f"{self._column(name).column.kind} {wanted(self._column(name))}" for name in self.reads}

    @property
    def gives(self) -> str:
        """See OpenedModel."""
        if self.of not in self.manifest.columns:
            return "its outputs"
        column = self._column(self.of).column
        some = ", ".join(self.classes[:5]) + ", …" * (len(self.classes) > 5)
        what = f"scores; predict() their names ({some})" if self.classes else "numbers in their units"
        return f"{column.kind} {column.extent}: {what}"

    def scaled(self, input: Any, **columns: Any) -> dict[str, Value]:
        """These rows as the bare net reads them, on its device."""
        given = {"input": input, **columns}
        if set(given) != set(self.reads):
            raise UserError("rows", f"given {', '.join(given)}, but the model reads {', '.join(self.reads)}")
        stored = {name: as_stored(name, self._column(name), rows, self.device) for name, rows in given.items()}
        return self.scaling(stored)

    @torch.no_grad()
    def forward(self, input: Any, **columns: Any) -> Any:
        """Rows -> the net's outputs, on its device; numbers in the units of what they are numbers of."""
        parts = [self._outputs(rows) for rows in pieces({"input": input, **columns})]
        outputs = joined(parts)
        return self.scaling.inverse(self.of, outputs) if isinstance(outputs, Tensor) else outputs

    def predict(self, input: Any, **columns: Any) -> Any:
        """Rows -> a list of the classes' names; where these have none, or numbers are predicted, a tensor of them.

        In the place of rows may stand the path of a file or a folder, or a list of paths, as `manta predict` takes
        them: text too, but where the model reads text, where a path is a `pathlib.Path`.
        """
        if (paths := as_paths(input, self._column("input").column)) is not None:
            return self._of_files(paths, columns)
        predicted = self.objective.predicted(self(input, **columns))
        if not self.classes or not isinstance(predicted, Tensor) or predicted.is_floating_point():
            return predicted
        return _named(predicted.tolist(), self.classes)

    def _of_files(self, paths: list[str], columns: Mapping[str, Any]) -> Any:
        if columns:
            raise UserError("rows", f"files, and {', '.join(columns)} beside them", "give one or the other")
        read = {name: self._column(name) for name in self.reads}
        files = GivenFiles(paths, read, self.recipe.data.file_columns, labelled=False, path="input")
        found = [self.predict(**piece.columns) for part in files.parts for piece in files.read(part)]
        return torch.cat(found) if isinstance(found[0], Tensor) else [name for names in found for name in names]

    def batch(self, rows: Mapping[str, Any]) -> Batch:
        """These rows as an objective is given them, on the device: so many as it is to compute at once."""
        columns = self.scaled(**rows)
        place = Place.of(len(rows["input"]))

        def keys() -> Tensor:  # of a net that draws noise: the same rows, the same noise
            return torch.from_numpy(row_keys(self.recipe.train.seed, 0, place.ids)).to(self.device)

        return Batch(columns, place, keys, unscale=self.scaling.inverse)

    def _outputs(self, rows: Mapping[str, Any]) -> Any:
        batch = self.batch(rows)
        with autocast(self.recipe.train.precision, self.device):
            outputs = self.objective.outputs(self.net, batch)
        return outputs.float() if isinstance(outputs, Tensor) else outputs


def pieces(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """So many rows at once as evaluation takes, which bounds memory; at least one piece."""
    whole = (Tensor, Dense, Ragged, list, tuple)
    rows = {name: values if isinstance(values, whole) else np.asarray(values) for name, values in columns.items()}
    for name, values in rows.items():
        if not getattr(values, "shape", (0,)):
            raise UserError(name, "one number, where the model takes a batch of rows", "give an array of them")
    if len({len(values) for values in rows.values()}) > 1:
        raise UserError("rows", f"columns of {', '.join(f'{len(v)} {n}' for n, v in rows.items())} rows")
    for first in range(0, max(1, len(next(iter(rows.values())))), EVALUATION_ROWS):
        some = slice(first, first + EVALUATION_ROWS)
        yield {n: v.take(some) if isinstance(v, Dense | Ragged) else v[some] for n, v in rows.items()}


def _named(numbers: Any, names: tuple[str, ...]) -> Any:
    if isinstance(numbers, list):
        return [_named(number, names) for number in numbers]
    return names[numbers]


def class_number(label: str, names: tuple[str, ...], size: int, *, path: str) -> int:
    """The number of a class, by its name or number. Raises UserError, naming `path`, for what is none."""
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < size:
        return int(label)
    raise UserError(path, f"{label!r} is no class of this run's data", did_you_mean(label, names))
