"""open_model: a run's model as files meet it: it takes bytes or numbers in their units, and gives classes by name."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cluster.adversarial.halves import described, sample
from cluster.data.manifest import StoredColumn
from cluster.data.sources.flat_trees import FlatTree, of_joins, spelled
from cluster.data.vocabulary import Vocabulary, told
from cluster.runs.coder import Coder
from cluster.runs.given import MOST_OF_A_BYTE, dense, wanted
from cluster.runs.given_trees import read_sentence
from cluster.runs.predictor import MOST_NUMBERS, OpenedModel, Predictor, class_number
from cluster.storage import Folder
from cluster.training.checkpoints import restore_model
from cluster.training.evaluation import autocast
from cluster.training.run_directory import RECIPE, RunDirectory
from nn_models.adversarial import Halves
from nn_models.columns import UNKNOWN, Ahead, Numbers, Sequence, Tokens
from nn_models.errors import UserError
from nn_models.parser import ParserNet
from nn_models.sequence_evidence import first_token, written

logger = logging.getLogger(__name__)


def open_model(run: str, *, device: torch.device | str | None = None) -> OpenedModel:
    """The best model of a run or a sweep, from RUN/model alone.

    It is a Generator where the run is a GAN's, a Writer where it is a language model's, a Forecaster where it forecasts
    a series, a Parser where it finds trees, a Coder where it is an autoencoder's, else a Predictor.

    It takes what the files of its data hold: pixels as bytes 0 to 255, features in their units; `print` it to see.
    Raises UserError where there is no model or its weights do not fit.
    """
    folder = Folder(run)
    recipe = RunDirectory(folder).recipe(f"model/{RECIPE}")
    net, saved = restore_model(folder, recipe)
    objective, model = recipe.objective, recipe.model
    other = Writer if objective.writes else Forecaster if objective.forecasts else Predictor
    other = Parser if model.gives & {"tree", "labelled_tree"} else Coder if model.codes else other
    kind = Generator if "halves" in model.gives else other
    return kind(net.to(device or "cpu"), recipe, saved)


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
        return [spelled(tree.words, tree.children, tree.labels if tree.labels[0] else None) for tree in trees]

    def parse(self, sentence: str | list[str], *, path: str = "sentence") -> FlatTree:
        """The tree of a sentence, of words that spaces separate, or that a list has. Raises UserError for no words.

        Its nodes have labels where the parser has learned them.
        """
        given = read_sentence(sentence, path=path)
        words = [word for word in given.words if word is not None]
        parsed = self([given])
        tree = of_joins(words, [(first, end) for first, end in parsed.brackets[0].tolist()])
        if parsed.labelled is None:
            return tree
        of_words = parsed.labelled.scores[: len(words)].argmax(1)
        return tree._replace(labels=[self.classes[label] for label in (*of_words, *parsed.labelled.labels[0])])


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
