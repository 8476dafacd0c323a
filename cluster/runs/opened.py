"""open_model: a run's model as files meet it: it takes bytes or numbers in their units, and gives classes by name."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cluster.adversarial.halves import described, sample
from cluster.data.keys import row_keys
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.scaling import Scaling
from cluster.data.sources.flat_trees import FlatTree, of_joins, spelled
from cluster.data.vocabulary import Vocabulary, told
from cluster.recipe.recipe import Recipe
from cluster.runs.given import MOST_OF_A_BYTE, as_stored, dense, wanted
from cluster.runs.given_trees import read_sentence
from cluster.storage import Folder
from cluster.training.carry import joined
from cluster.training.checkpoints import SavedModel, restore_model
from cluster.training.evaluation import autocast
from cluster.training.run_directory import RECIPE, RunDirectory
from cluster.training.splits import EVALUATION_ROWS
from nn_models.adversarial import Halves
from nn_models.batch import Batch, Place, Value
from nn_models.columns import UNKNOWN, Ahead, Numbers, Sequence, Tokens
from nn_models.errors import UserError, did_you_mean
from nn_models.objectives import Objective
from nn_models.parser import ParserNet
from nn_models.sequence_evidence import first_token, written

logger = logging.getLogger(__name__)

MOST_NUMBERS = 100_000_000  # that are made at once: 400 MB


def open_model(run: str, *, device: torch.device | str | None = None) -> "OpenedModel":
    """The best model of a run or a sweep, from RUN/model alone.

    It is a Generator where the run is a GAN's, a Writer where it is a language model's, a Forecaster where it forecasts
    a series, a Parser where it finds trees, a Coder where it is an autoencoder's, else a Predictor.

    It takes what the files of its data hold: pixels as bytes 0 to 255, features in their units; `print` it to see.
    Raises UserError where there is no model or its weights do not fit.
    """
    from cluster.runs.coder import Coder  # it is a Predictor, of this file

    folder = Folder(run)
    recipe = RunDirectory(folder).recipe(f"model/{RECIPE}")
    net, saved = restore_model(folder, recipe)
    objective, model = recipe.objective, recipe.model
    other = Writer if objective.writes else Forecaster if objective.forecasts else Predictor
    other = Parser if "tree" in model.gives else Coder if model.codes else other
    kind = Generator if "halves" in model.gives else other
    return kind(net.to(device or "cpu"), recipe, saved)


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
        """Rows -> a list of the classes' names; where these have none, or numbers are predicted, a tensor of them."""
        predicted = self.objective.predicted(self(input, **columns))
        if not self.classes or not isinstance(predicted, Tensor) or predicted.is_floating_point():
            return predicted
        return _named(predicted.tolist(), self.classes)

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


class Writer(Predictor):
    """A language model: `write` goes on with a text, token by token; called, it scores what follows each token.

    It takes rows of tokens as a Predictor does; `vocabulary` makes them of text.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens, and what they are."""
        return Vocabulary.of_column(cast(Tokens, self._column("input").column))

    def write(self, num: int, *, prompt: str = "", temperature: float = 1.0, seed: int = 0) -> Iterator[str]:
        """So many tokens that follow the prompt, each as soon as it is drawn; the same seed gives the same.

        A token is drawn from softmax(scores / temperature): the likeliest ones more and more as the temperature falls,
        and the likeliest one always at 0. Without a prompt the text begins as after the end of a line, where there is
        one. Raises UserError for tokens of the prompt that are not in the vocabulary.
        """
        if temperature < 0:
            raise UserError("--temperature", f"{temperature:g} is below 0", "give 0 for the likeliest, or more")
        vocabulary = self.vocabulary
        start = vocabulary.numbers(prompt, path="--prompt")
        if unknown := vocabulary.unknown(prompt):
            logger.warning("--prompt: %s not in the vocabulary, so read as %s", told(unknown), UNKNOWN)
        if not len(start):
            start = np.array([first_token(cast(Tokens, self._column("input").column))], np.int32)
        generator = torch.Generator().manual_seed(seed)
        words = torch.from_numpy(start).to(self.device)
        return vocabulary.spelled(written(self._scores, words, num, temperature=temperature, generator=generator))

    def _scores(self, *args: Any, **named: Any) -> Any:
        with autocast(self.recipe.train.precision, self.device):
            return self.net(*args, **named)


class Forecaster(Predictor):
    """A forecaster of series: `forecast` says how some go on; called, it takes windows as its data has them.

    Where that is relative (`ahead.relative`) they are differences to their last step, as what it then gives.
    """

    @property
    def ahead(self) -> Ahead:
        """Which columns it reads and forecasts, and how far."""
        ahead = cast(Numbers, self._column("target").column).ahead
        assert ahead is not None  # its objective takes nothing else
        return ahead

    @property
    def window(self) -> int:
        """Steps that a forecast is made from."""
        return cast(Sequence, self._column("input").column).row_shape[0]

    @property
    def gives(self) -> str:
        """See OpenedModel."""
        ahead = self.ahead
        return f"the next {ahead.steps} steps of {', '.join(ahead.names)}, in their units; forecast() by step"

    def forecast(self, past: Any) -> Tensor:
        """The last steps of a series (T, D), or of several (rows, T, D) -> the next ones, (H, K) or (rows, H, K).

        In the units of the file, on the model's device; D are the columns that `ahead` names, K its first ones. Of more
        steps than the window has the last ones are read. Raises UserError for fewer, and for what is no finite number.
        """
        steps = torch.as_tensor(np.asarray(past.cpu() if isinstance(past, Tensor) else past, np.float32))
        ahead, window = self.ahead, self.window
        wanted = f"at least {window} steps of {', '.join(ahead.columns)}"
        if steps.dim() not in (2, 3) or steps.shape[-1] != len(ahead.columns) or steps.shape[-2] < window:
            raise UserError("past", f"of shape {tuple(steps.shape)}, where the model reads {wanted}", "give that many")
        if not bool(steps.isfinite().all()):
            raise UserError("past", "NaN or infinity", "fill such steps")
        rows = steps[..., -window:, :].reshape(-1, window, len(ahead.columns))
        level = rows[:, -1:] if ahead.relative else torch.zeros_like(rows[:, -1:])
        following = self(rows - level).view(-1, ahead.steps, ahead.targets)
        following = following + level[..., : ahead.targets].to(following.device)
        return following[0] if steps.dim() == 2 else following


class Parser(Predictor):
    """A parser: `parse` says which tree a sentence has."""

    net: ParserNet

    @property
    def gives(self) -> str:
        """See OpenedModel."""
        return "brackets (rows, joins, 2): first word, and that behind the last; predict() trees; parse() one"

    @torch.no_grad()
    def forward(self, input: Any, **columns: Any) -> Any:
        """Rows of trees, whose words alone are read -> nn_models.parser.Parsed, all rows at once."""
        return self._outputs({"input": input, **columns})

    def predict(self, input: Any, **columns: Any) -> list[str]:
        """Sentences -> their trees in brackets."""
        trees = [self.parse(sentence, path="input") for sentence in input]
        return [spelled(tree.words, tree.children) for tree in trees]

    def parse(self, sentence: str | list[str], *, path: str = "sentence") -> FlatTree:
        """The tree of a sentence, of words that spaces separate, or that a list has. Raises UserError for no words."""
        given = read_sentence(sentence, path=path)
        words = [word for word in given.words if word is not None]
        return of_joins(words, [(first, end) for first, end in self([given]).brackets[0].tolist()])


class Generator(OpenedModel):
    """A GAN's best generator: it makes rows as the files hold them, pixels as bytes 0 to 255, numbers in their units.

    `model(16)` makes 16 rows, of the classes in turn where it makes what it is asked for; `model(16, label="3")` those
    of one class, and `model(given=images)` a row of each image where it starts from images. `net.generator` and
    `net.discriminator` are the bare halves.
    """

    net: Halves

    @property
    def given(self) -> StoredColumn | None:
        """The column that says what is to be made of the noise."""
        name = described(self.recipe)[0].given
        return self._column(name) if name else None

    @property
    def starts(self) -> bool:
        """Whether it makes rows from other rows, and not from noise alone or a class."""
        return self.given is not None and self.given.column.scaled

    @property
    def takes(self) -> Mapping[str, str]:
        """See OpenedModel."""
        if self.given is None:
            return {"num": "how many rows"}
        return {"given": wanted(self.given)} if self.starts else {"num": "how many rows", "label": "a class's name"}

    @property
    def gives(self) -> str:
        """See OpenedModel."""
        return f"{self._column('input').column.kind} {wanted(self._column('input'))}"

    def forward(
        self, num: int | None = None, *, label: str | int | None = None, given: Any = None, seed: int = 0
    ) -> Tensor:
        """Rows (num, *shape) as stored, on the CPU; the same seed makes the same. Raises UserError."""
        stored, made = self._column("input"), self.made(num, label=label, given=given, seed=seed)
        rows = self.scaling.inverse("input", made.to(self.device)).cpu()
        return rows.round().clamp(0, MOST_OF_A_BYTE).to(torch.uint8) if stored.dtype == "uint8" else rows

    @torch.no_grad()
    def made(
        self,
        num: int | None,
        *,
        label: str | int | None = None,
        given: Any = None,
        condition: Tensor | None = None,
        seed: int = 0,
        path: str = "",
    ) -> Tensor:
        """The same as the generator makes it: images in [-1, 1], features standardised; on the CPU.

        `condition` is what is given, scaled already. `path` stands before the arguments' names in errors.
        """
        model, column = described(self.recipe)[0], self.given
        if label is not None and (column is None or self.starts):
            raise UserError(
                f"{path}label", f"{model.kind} makes rows without labels", "leave it out, or train a conditional_gan"
            )
        if self.starts and model.given and column:
            if condition is None:
                if given is None:
                    raise UserError(f"{path}given", f"{model.kind} starts from rows", f"give {wanted(column)}")
                stored = dense("given", column, given).to(self.device)
                condition = cast(Tensor, self.scaling({model.given: stored})[model.given])
            num = len(condition)
        elif given is not None:
            raise UserError(f"{path}given", f"{model.kind} starts from noise", "say how many rows to make")
        most = MOST_NUMBERS // self.manifest.signature.input_size
        if num is None or not 1 <= num <= most:
            shape = self.manifest.signature.input_shape
            raise UserError(f"{path}num", f"{num} rows of {shape}; from 1 to {most} can be made at once")
        if column is not None and not self.starts:
            size = column.column.num_outputs
            condition = torch.arange(num) % size
            if label is not None:
                names = getattr(column.column, "names", ())
                condition = torch.full((num,), class_number(str(label), names, size, path=f"{path}label"))
        source = torch.randn(num, model.noise_size, generator=torch.Generator().manual_seed(seed))
        return sample(self.net.generator, source, condition, device=self.device, seed=seed)


def pieces(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """So many rows at once as evaluation takes, which bounds memory; at least one piece."""
    rows = {
        name: values if isinstance(values, (Tensor, list, tuple)) else np.asarray(values)
        for name, values in columns.items()
    }
    for name, values in rows.items():
        if not getattr(values, "shape", (0,)):
            raise UserError(name, "one number, where the model takes a batch of rows", "give an array of them")
    if len({len(values) for values in rows.values()}) > 1:
        raise UserError("rows", f"columns of {', '.join(f'{len(v)} {n}' for n, v in rows.items())} rows")
    for first in range(0, max(1, len(next(iter(rows.values())))), EVALUATION_ROWS):
        yield {name: values[first : first + EVALUATION_ROWS] for name, values in rows.items()}


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
