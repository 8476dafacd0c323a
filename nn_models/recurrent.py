"""Recurrent nets: Elman, LSTM, peephole LSTM, GRU, over sequences, texts, and images as sequences.

Shapes: B rows of the batch, T steps of the longest, N steps of all rows, D numbers of a step, H units, S directions
(1, 2), L layers, V words, K outputs.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from nn_models.activations import initialise
from nn_models.batch import Batch, Ragged
from nn_models.columns import Column, Image, Label, Labels, Numbers, Sequence, Tokens
from nn_models.errors import UserError
from nn_models.inspection import inspect
from nn_models.model import Batching, reading
from nn_models.recurrence import (
    Cell,
    CellLayers,
    ElmanCell,
    FusedLayers,
    GRUCell,
    Layers,
    LSTMCell,
    PeepholeCell,
    RecurrentInit,
    Reset,
    State,
    StepActivation,
    initialise_recurrence,
)
from nn_models.signature import Signature
from nn_models.spec import invalid
from nn_models.word_vectors import WordVectorsSpec

Pool = Literal["last", "mean", "max"]
ImageSteps = Literal["rows", "pixels"]

# Units of a layer, and units times rows of a batch, up to which fused trials were quicker.
MOST_FUSED_UNITS, MOST_FUSED_STATES = 128, 8192


class RecurrentNet(nn.Module):
    """Layers of cells over the steps of each row, and a dense layer on what they say.

        h[t] = cells(x[t], h[t-1])
        for each step:  y[t] = V h[t] + c                      (labels of steps, such as the next token)
        for each row:   y = V pool(h[1] ... h[T]) + c          (classes, numbers)

    where `pool` takes the last state (of both directions), the mean or the maximum over the row's steps. Dropout
    stands on all connections that are not recurrent: of embeddings, between layers and before the output (Zaremba et
    al. 2014). What pads a row changes nothing.
    """

    def __init__(
        self,
        column: Column,
        num_outputs: int,
        *,
        make_layers: Callable[[int], Layers],
        each_step: bool,
        pool: Pool,
        images: ImageSteps,
        permutation: int | None,
        embedding: int,
        tied: bool,
        dropout: float,
        learned_state: bool,
    ) -> None:
        """`make_layers` makes them for so many inputs of a step."""
        super().__init__()
        self.each_step, self.pool, self.images = each_step, pool, images
        self.embedding = nn.Embedding(column.num_outputs, embedding) if isinstance(column, Tokens) else None
        self.dropout = nn.Dropout(dropout)
        num_steps, num_inputs = _extent(column, images)
        self.layers = make_layers(num_inputs or embedding)
        if permutation is not None:
            assert num_steps is not None
            order = torch.randperm(num_steps, generator=torch.Generator("cpu").manual_seed(permutation), device="cpu")
            self.register_buffer("order", order.to(torch.get_default_device()))
        self.permuted = permutation is not None
        if learned_state:
            shape = (self.layers.num_states, self.layers.num_layers * self.layers.num_directions, self.layers.num_units)
            self.initial = nn.Parameter(torch.zeros(shape))
        self.learned_state = learned_state
        self.output = nn.Linear(self.layers.width, num_outputs)
        initialise(self.output, activation=None)
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, 0.0, embedding**-0.5)
            if tied:  # Press & Wolf 2017
                self.output.weight = self.embedding.weight

    def forward(self, x: Tensor | Ragged, state: State | None = None, *, keep_state: bool = False) -> Any:
        """Steps (B, T, D), words (B, T), images (B, C, height, width), or Ragged ones -> (B, K), or (N, K) a step each.

        Steps stand row after row. `state` are those that rows go on from, (B, L * S, H) each; with `keep_state` they
        are returned beside the outputs as they are after each row's last step.
        """
        steps, before, lengths = self.given(x)
        if state is not None:  # what was learned must take part: ranks wait for the gradient of each weight
            before = tuple(part + 0 * first for part, first in zip(state, before, strict=True))
        outputs, after = self.layers(steps, before, lengths)
        said = self.output(self.dropout(self._said(x, outputs, after)))
        return (said, after) if keep_state else said

    def given(self, x: Tensor | Ragged) -> tuple[Tensor, State, Tensor | None]:
        """What the layers are given of such rows: steps (B, T, D), what rows begin with, and their lengths, if any."""
        steps, lengths = self._steps(x)
        return steps, self.initial_state(steps.shape[0], steps), lengths

    def initial_state(self, num_rows: int, like: Tensor) -> State:
        """What rows begin with: 0, or what was learned."""
        layers = self.layers
        if self.learned_state:
            return tuple(part.expand(num_rows, -1, -1) for part in self.initial)
        shape = (num_rows, layers.num_layers * layers.num_directions, layers.num_units)
        return tuple(like.new_zeros(shape) for _ in range(layers.num_states))

    def _steps(self, x: Tensor | Ragged) -> tuple[Tensor, Tensor | None]:
        """(B, T, D), and the lengths on the CPU where rows are shorter than others."""
        values = x.values if isinstance(x, Ragged) else x
        if self.embedding is not None:
            values = self.dropout(self.embedding(values))
        elif values.dim() == 4:
            values = values.permute(0, 2, 3, 1)  # (B, height, width, C)
            values = values.flatten(2) if self.images == "rows" else values.flatten(1, 2)
        if isinstance(x, Ragged):
            padded = Ragged(values, x.lengths, x.longest, x.cpu_lengths).padded()
            lengths = x.lengths.cpu() if x.cpu_lengths is None else x.cpu_lengths
            return padded, None if bool((lengths == x.longest).all()) else lengths.long()
        if self.permuted:
            values = values[:, self.get_buffer("order")]
        return values, None

    def _said(self, x: Tensor | Ragged, outputs: Tensor, after: State) -> Tensor:
        """What the output layer reads: (N, S * H), or (B, S * H)."""
        if self.each_step:
            flat = outputs.flatten(0, 1)
            return flat.index_select(0, x.places()) if isinstance(x, Ragged) else flat
        if self.pool == "last":
            return after[0][:, -self.layers.num_directions :].flatten(1)
        if not isinstance(x, Ragged):
            return outputs.mean(1) if self.pool == "mean" else outputs.amax(1)
        outside = ~x.mask()[..., None]
        if self.pool == "mean":
            return outputs.masked_fill(outside, 0).sum(1) / x.lengths[:, None]
        return outputs.masked_fill(outside, -torch.inf).amax(1)


def _extent(column: Column, images: ImageSteps) -> tuple[int | None, int]:
    """Steps of a row, None where rows differ, and numbers of a step, 0 for words."""
    if isinstance(column, Image):
        channels, height, width = column.shape
        return (height, width * channels) if images == "rows" else (height * width, channels)
    if isinstance(column, Sequence):
        return column.length, column.width
    assert isinstance(column, Tokens)
    return column.length, 0


class RecurrentSpec(WordVectorsSpec):
    """Base of the recurrent nets' descriptions."""

    reads = reading(input=(Sequence, Tokens, Image))
    gives = frozenset({"row", "elements"})
    sections = ("gradients", "gates")
    embedding: PositiveInt = Field(128, description="numbers that stand for a word")
    hidden: PositiveInt = Field(128, description="units of each layer, in each direction")
    layers: PositiveInt = Field(1, description="layers of cells, one on the other")
    bidirectional: bool = Field(False, description="a second set of cells reads each row from its end")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of what is not recurrent that is dropped in training")
    layer_norm: bool = Field(False, description="normalise what goes into each cell (Ba et al. 2016); slower")
    initial_state: Literal["zero", "learned"] = Field("zero", description="what a row begins with")
    recurrent_init: RecurrentInit = Field(
        "orthogonal", description="first weights from state to state; a matrix a gate"
    )
    pool: Pool = Field("last", description="what the output sees of a row: its last state, the mean or the maximum")
    images: ImageSteps = Field("rows", description="what a step of an image is")
    permutation: NonNegativeInt | None = Field(
        None, description="seed of a fixed new order of the steps (Le et al. 2015)"
    )
    tied: bool = Field(False, description="the output's weights are the embedding's (Press & Wolf 2017)")

    @property
    def sees_ahead(self) -> bool:
        """See ModelSpec."""
        return self.bidirectional

    def check(self, signature: Signature) -> None:
        """See ModelSpec."""
        super().check(signature)
        column, target = signature["input"], signature["target"]
        if not isinstance(target, Label | Labels | Numbers):
            raise UserError("model.kind", f"{self.kind} predicts no {target.kind}", "choose another data set")
        if self.permutation is not None and (isinstance(column, Tokens) or _extent(column, self.images)[0] is None):
            what = f"{column.describe()} has no fixed number of steps to reorder"
            raise UserError("model.permutation", what, "leave it out")
        if not self.tied:
            return
        if self.freeze_vectors:
            raise UserError(
                "model.freeze_vectors", "tied weights are the output's too, which has to learn", "leave it out"
            )
        if not isinstance(column, Tokens) or not isinstance(target, Labels) or target.size != column.size:
            raise UserError("model.tied", "only a net that gives words for words has such weights", "leave it out")
        if self.embedding != self.hidden * (1 + self.bidirectional):
            sizes = (
                f"an embedding of {self.embedding} and {self.hidden * (1 + self.bidirectional)} outputs of the cells"
            )
            raise UserError("model.tied", sizes, "give both one size")

    def build(self, signature: Signature) -> RecurrentNet:
        """The module: rows of steps -> (B, num_outputs), or for labels of steps (N, num_outputs)."""
        net = RecurrentNet(
            signature["input"],
            signature.num_outputs,
            make_layers=self.make_layers,
            each_step=isinstance(signature["target"], Labels),
            pool=self.pool,
            images=self.images,
            permutation=self.permutation,
            embedding=self.embedding,
            tied=self.tied,
            dropout=self.dropout,
            learned_state=self.initial_state == "learned",
        )
        self.settle(net)
        return net

    def inspect(self, model: nn.Module, signature: Signature, batch: Batch) -> Mapping[str, Tensor]:
        """See ModelSpec: beside the net one of each standard kind and of its size, as it is before training."""
        assert isinstance(model, RecurrentNet)
        shared = {name: getattr(self, name) for name in RecurrentSpec.model_fields if name != "kind"}
        nets = {"trained": model}
        with torch.random.fork_rng(devices=[]):
            for spec in (RNNSpec(**shared), LSTMSpec(**shared), GRUSpec(**shared)):
                torch.default_generator.manual_seed(0)
                nets[spec.kind] = spec.build(signature).to(model.output.weight.device).eval()
            return inspect(nets, batch)

    def make_layers(self, num_inputs: int) -> Layers:
        """The layers for so many numbers of a step, initialised."""
        layers = self._fused(num_inputs) or self._by_cells(num_inputs)
        initialise_recurrence(layers, self.recurrent_init)
        return layers

    def _fused(self, num_inputs: int) -> FusedLayers | None:
        """By torch's kernels; None where there are none for such cells."""
        return None

    def _shape(self) -> dict[str, Any]:
        """What torch.nn's modules are told of the layers."""
        between = self.dropout if self.layers > 1 else 0.0
        return {
            "num_layers": self.layers,
            "bidirectional": self.bidirectional,
            "dropout": between,
            "batch_first": True,
        }

    def _by_cells(self, num_inputs: int) -> CellLayers:
        directions = 1 + self.bidirectional
        widths = [num_inputs, *[self.hidden * directions] * (self.layers - 1)]
        cells = [self._cell(width) for width in widths for _ in range(directions)]
        return CellLayers(cells, num_layers=self.layers, bidirectional=self.bidirectional, dropout=self.dropout)

    def _cell(self, num_inputs: int) -> Cell:
        raise NotImplementedError


class _Batched(RecurrentSpec):
    """Base of those that fused trials compute by vmap, step by step.

    A step of a small net costs torch more in calls than in arithmetic, and the calls are then shared. LSTMs are not
    among them: all steps of one are a single call of oneDNN's, and forward and backward alone 16 fused ones of 16 / 32
    / 128 units (batches of 16 / 32 / 32, 28 steps) were 0.7 / 0.6 / 0.4 times as quick.
    """

    @property
    def batches(self) -> Batching:
        """See ModelSpec."""
        return "vmap"

    def quicker_fused(self, signature: Signature, num_rows: int) -> bool:
        """See ModelSpec. While a layer's states of a step are few: 8192 numbers a trial, and no more than 128 units."""
        return self.hidden <= MOST_FUSED_UNITS and self.hidden * num_rows <= MOST_FUSED_STATES


class RNNSpec(_Batched):
    """Plain recurrent net: h[t] = f(A [h[t-1], x[t]] + b) (Elman 1990)."""

    kind: Literal["rnn"] = "rnn"
    activation: StepActivation = Field("tanh", description="f; tanh and relu run by torch's kernels")

    def _fused(self, num_inputs: int) -> FusedLayers | None:
        if self.layer_norm or self.activation not in ("tanh", "relu"):
            return None
        return FusedLayers(nn.RNN(num_inputs, self.hidden, nonlinearity=self.activation, **self._shape()))

    def _cell(self, num_inputs: int) -> ElmanCell:
        return ElmanCell(num_inputs, self.hidden, activation=self.activation, layer_norm=self.layer_norm)


class _WithForgetGate(RecurrentSpec):
    """Base of the LSTMs."""

    forget_bias: float = Field(1.0, description="first bias of the forget gate (Jozefowicz et al. 2015)")

    def make_layers(self, num_inputs: int) -> Layers:
        """See RecurrentSpec."""
        layers = super().make_layers(num_inputs)
        with torch.no_grad():
            for name, bias in layers.named_parameters():
                if ".bias" in name and "norm" not in name:
                    bias[self.hidden : 2 * self.hidden] = self.forget_bias if "bias_ih" in name else 0.0
        return layers


class LSTMSpec(_WithForgetGate):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gates (Gers et al. 2000)."""

    kind: Literal["lstm"] = "lstm"

    def _fused(self, num_inputs: int) -> FusedLayers | None:
        return None if self.layer_norm else FusedLayers(nn.LSTM(num_inputs, self.hidden, **self._shape()))

    def _cell(self, num_inputs: int) -> LSTMCell:
        return LSTMCell(num_inputs, self.hidden, layer_norm=self.layer_norm)


class PeepholeLSTMSpec(_WithForgetGate):
    """LSTM whose gates see the cell (Gers & Schmidhuber 2000)."""

    kind: Literal["peephole_lstm"] = "peephole_lstm"

    def _cell(self, num_inputs: int) -> PeepholeCell:
        return PeepholeCell(num_inputs, self.hidden, layer_norm=self.layer_norm)


class GRUSpec(_Batched):
    """Gated recurrent unit (Cho et al. 2014)."""

    kind: Literal["gru"] = "gru"
    reset: Reset = Field("after", description="the reset gate's place: after the product (cuDNN), or before (Cho 2014)")

    @model_validator(mode="after")
    def _one_product_to_normalise(self) -> "GRUSpec":
        if self.layer_norm and self.reset == "before":
            raise invalid("goes with reset: after only", "leave one of them out", field="layer_norm")
        return self

    def _fused(self, num_inputs: int) -> FusedLayers | None:
        if self.layer_norm or self.reset == "before":
            return None
        return FusedLayers(nn.GRU(num_inputs, self.hidden, **self._shape()))

    def _cell(self, num_inputs: int) -> GRUCell:
        return GRUCell(num_inputs, self.hidden, reset=self.reset, layer_norm=self.layer_norm)
