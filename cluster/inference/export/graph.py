"""Graph: a run's model from what files hold to what people read: scaling, the net and the decoding in one module.

Shapes: B rows of the batch, C classes, K numbers of a code, N numbers of noise, T steps and D columns of a series.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from cluster.adversarial.halves import described
from cluster.data.manifest import StoredColumn
from cluster.runs.coder import Coder
from cluster.runs.given import MOST_OF_A_BYTE
from cluster.runs.opened import Forecaster, Generator
from cluster.runs.predictor import OpenedModel, Predictor
from nn_models.batch import Batch, Place, Value
from nn_models.errors import UserError

ELSE = "export it with --format safetensors-hub, which open_model reads"


@dataclass(frozen=True)
class Port:
    """What goes in or comes out under a name: `shape` is that of a row, `meaning` is for people."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    meaning: str

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "shape": ["rows", *self.shape]}


class Graph(nn.Module):
    """Base: called with tensors of its `inputs`, in their order, it gives a tuple of its `outputs`, all rows first.

    It computes in float32 and draws nothing. `classes` has the names that the numbers of an output `label` stand for,
    `vocabulary` those that the numbers of tokens in `input` stand for.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __init__(self, model: OpenedModel) -> None:
        super().__init__()
        self.net = model.net
        self.scaling = model.scaling
        self.classes = model.classes
        self.vocabulary = model.manifest.signature["input"].vocabulary
        self.columns: Mapping[str, StoredColumn] = model.manifest.columns
        self.eval()

    def unit(self, column: str) -> Tensor:
        """(1, *shape of a row): what 1 of the net's numbers is in the units of this column."""
        shape = (1, *self.columns[column].column.row_shape)
        return self.scaling.inverse(column, torch.ones(shape)) - self.scaling.inverse(column, torch.zeros(shape))

    def units(self) -> dict[str, Tensor]:
        """Output -> what 1 of the net's numbers is in its units; without those that have none."""
        return {}


class _Read(Graph):
    """Base of those that read rows: what the net gives for them is what its objective asks it."""

    def __init__(self, model: Predictor) -> None:
        super().__init__(model)
        self.objective, self.of = model.objective, model.of
        self.inputs = tuple(_port(name, self.columns[name]) for name in model.reads)

    def scaled(self, **rows: Tensor) -> Batch:
        """Rows as they are stored -> what an objective is given of them."""
        return Batch(self.scaling(cast(dict[str, Value], rows)), Place.of(0), _no_noise)

    def given(self, batch: Batch) -> Tensor:
        """What the net gives, in float32."""
        outputs: Tensor = self.objective.outputs(self.net, batch)
        return outputs.float()


class Classes(_Read):
    """Rows -> the number of each one's class, and the probabilities of all; of each element where these have classes.

    p = softmax(scores), label = argmax p
    """

    def __init__(self, model: Predictor) -> None:
        super().__init__(model)
        column = self.columns[self.of].column
        self.each, self.size = column.row_shape, column.num_outputs
        what = "the class's number" if not self.each else "of each element, the class's number"
        self.outputs = (
            Port("label", "int64", self.each, what),
            Port("probabilities", "float32", (*self.each, self.size), "of the classes, in the order of their numbers"),
        )

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """(B, *shape) -> (B,) and (B, C); of elements (B, T) and (B, T, C)."""
        scores = self.given(self.scaled(input=input)).reshape(input.shape[0], *self.each, self.size)
        return scores.argmax(-1), scores.softmax(-1)


class Units(_Read):
    """Rows -> the numbers that are predicted of them, in their units."""

    def __init__(self, model: Predictor) -> None:
        super().__init__(model)
        shape = self.columns[self.of].column.row_shape
        self.outputs = (Port("numbers", "float32", shape, "what is predicted, in the units of the file"),)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """(B, *shape) -> (B, outputs)."""
        return (self.scaling.inverse(self.of, self.given(self.scaled(input=input))),)

    def units(self) -> dict[str, Tensor]:
        """See Graph."""
        return {"numbers": self.unit(self.of)}


class Ahead(_Read):
    """The last steps of series -> the next ones, in the units of the file: as `Forecaster.forecast`."""

    def __init__(self, model: Forecaster) -> None:
        super().__init__(model)
        self.ahead = model.ahead
        (given,) = self.inputs
        read, shape = ", ".join(self.ahead.columns), (self.ahead.steps, self.ahead.targets)
        self.inputs = (Port(given.name, given.dtype, given.shape, f"the last steps of {read}, in their units"),)
        self.outputs = (Port("forecast", "float32", shape, f"the next steps of {', '.join(self.ahead.names)}"),)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """(B, T, D) -> (B, steps, targets)."""
        level = input[:, -1:] if self.ahead.relative else torch.zeros_like(input[:, -1:])
        following = self.scaling.inverse(self.of, self.given(self.scaled(input=input - level)))
        return (following.reshape(-1, self.ahead.steps, self.ahead.targets) + level[..., : self.ahead.targets],)

    def units(self) -> dict[str, Tensor]:
        """See Graph."""
        return {"forecast": self.unit(self.of).reshape(1, self.ahead.steps, self.ahead.targets)}


class Coding(_Read):
    """Rows -> their codes, the rows again in the units of the file, and the squared error a number: as `Coder`."""

    def __init__(self, model: Coder) -> None:
        super().__init__(model)
        self.outputs = (
            Port("codes", "float32", (model.num_codes,), "the rows' codes"),
            Port("rows", "float32", self.inputs[0].shape, "the rows again, in the units of the file, not rounded"),
            Port("error", "float32", (), "the mean squared error of the row again, at the scale that the net reads"),
        )

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """(B, *shape) -> (B, K), (B, *shape) and (B,)."""
        return self.coded(self.scaled(input=input))

    def coded(self, batch: Batch, *told: Tensor) -> tuple[Tensor, ...]:
        """The same of scaled rows, and of what the net is told beside them."""
        again = self.given(batch)
        codes = cast(Any, self.net).encode(batch["input"], *told)
        error = (again - batch["input"]).square().flatten(1).mean(1)
        return codes.float(), self.scaling.inverse("input", again), error

    def units(self) -> dict[str, Tensor]:
        """See Graph."""
        return {"rows": self.unit("input")}


class ToldCoding(Coding):
    """The same of a net that is told each row's class."""

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # one input more
        """(B, *shape) and (B,) -> see Coding."""
        batch = self.scaled(input=input, target=target)
        return self.coded(batch, cast(Tensor, batch["target"]))


class Making(Graph):
    """Noise -> rows in the units of the file, not rounded: a GAN's generator."""

    def __init__(self, model: Generator) -> None:
        super().__init__(model)
        stored = self.columns["input"]
        self.as_bytes = stored.dtype == "uint8"
        self.generator = model.net.generator
        noise = Port("noise", "float32", (described(model.recipe)[0].noise_size,), "standard normal numbers")
        what = "bytes 0 to 255, not rounded" if self.as_bytes else "rows in the units of the file"
        self.inputs = (noise,)
        self.outputs = (Port("rows", "float32", stored.column.row_shape, what),)

    def forward(self, noise: Tensor) -> tuple[Tensor, ...]:
        """(B, N) -> (B, *shape)."""
        return (self.stored(self.generator(noise, None)),)

    def stored(self, made: Tensor) -> Tensor:
        """What a generator makes, as files hold it."""
        rows = self.scaling.inverse("input", made.float())
        return rows.clamp(0, MOST_OF_A_BYTE) if self.as_bytes else rows

    def units(self) -> dict[str, Tensor]:
        """See Graph."""
        return {"rows": self.unit("input")}


class MakingOf(Making):
    """Noise and the class that is asked for -> rows: a conditional GAN's generator."""

    def __init__(self, model: Generator) -> None:
        super().__init__(model)
        name = cast(str, described(model.recipe)[0].given)
        self.name = name
        self.inputs = (*self.inputs, _port(name, self.columns[name]))

    def forward(self, noise: Tensor, target: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # one input more
        """(B, N) and (B,) -> (B, *shape)."""
        return (self.stored(self.generator(noise, target)),)


class MakingFrom(Making):
    """Rows to start from -> rows: pix2pix's generator. `noise` has no numbers where the generator takes none."""

    def __init__(self, model: Generator) -> None:
        super().__init__(model)
        model_spec = described(model.recipe)[0]
        self.name, self.noise_size = cast(str, model_spec.given), model_spec.noise_size
        if self.noise_size:
            _refuse("it starts from rows and from noise as well")
        self.inputs = (_port(self.name, self.columns[self.name]),)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, *shape of the condition) -> (B, *shape)."""
        scaled = cast(Tensor, self.scaling({self.name: condition})[self.name])
        return (self.stored(self.generator(scaled.new_empty(scaled.shape[0], 0), scaled)),)


def graph_of(model: OpenedModel) -> Graph:
    """The graph of an opened model. Raises UserError where there can be none, with the reason."""
    if isinstance(model, Generator):
        return (MakingFrom if model.starts else MakingOf if model.given else Making)(model)
    assert isinstance(model, Predictor)
    for name in model.reads:
        column = model.manifest.signature[name]
        if column.layout == "ragged":
            _refuse(
                f"its {name} is {column.noun} ({column.describe()}), each with as many elements as it has, and what is "
                "computed of a row follows from these, where a graph has rows of one shape"
            )
    if isinstance(model, Coder):
        return (ToldCoding if model.told else Coding)(model)
    if isinstance(model, Forecaster):
        return Ahead(model)
    if len(model.reads) > 1:
        _refuse(f"it reads {', '.join(model.reads)}")
    return (Units if model.manifest.columns[model.of].column.scaled else Classes)(model)


def _port(name: str, stored: StoredColumn) -> Port:
    column = stored.column
    as_bytes = stored.dtype == "uint8"
    meaning = "bytes 0 to 255" if as_bytes else "in the units of the file" if column.scaled else "numbers of the names"
    return Port(name, stored.dtype, column.row_shape, f"{column.describe()}: {meaning}")


def _refuse(why: str) -> NoReturn:
    raise UserError("--format", f"the model cannot be a graph: {why}", ELSE)


def _no_noise() -> NoReturn:
    _refuse("it draws noise of each row's key")
