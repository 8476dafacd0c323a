"""Sequence autoencoder: one recurrent net reads a sequence into a code, and another writes it again from the code.

Shapes: B rows of the batch, T steps of a row, D numbers of a step, H units, K numbers of a code.
"""

from collections.abc import Callable
from collections.abc import Sequence as Sizes
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from nn_models.activations import initialise
from nn_models.coding import CodingNet, CodingSpec, Unit, UnitName
from nn_models.columns import Image, Sequence
from nn_models.errors import UserError
from nn_models.model import reading
from nn_models.recurrence import Layers, State
from nn_models.recurrent import GRUSpec, LSTMSpec, RecurrentSpec, RNNSpec
from nn_models.signature import Signature

CellName = Literal["rnn", "lstm", "gru"]
CELLS: dict[CellName, Callable[..., RecurrentSpec]] = {"rnn": RNNSpec, "lstm": LSTMSpec, "gru": GRUSpec}


class SequenceAutoencoder(CodingNet):
    """Recurrent encoder and decoder (Sutskever, Vinyals & Le 2014; Srivastava, Mansimov & Salakhutdinov 2015).

        s[t] = cells(x[t], s[t-1])         h = f(W s[T] + b)          s[T] the last layer's
        u[t] = cells'(h, u[t-1])           r[t] = V u[t] + c          u[0] = 0

    The decoder is given the code at each step and nothing of the row itself. An image is read row by row.
    """

    def __init__(
        self, row_shape: Sizes[int], *, encoder: Layers, decoder: Layers, code: int, code_activation: UnitName
    ) -> None:
        """`row_shape` is (T, D), or (channels, height, width); `encoder` reads D numbers a step, `decoder` K."""
        super().__init__()
        self.row_shape = tuple(row_shape)
        self.num_steps, width = _steps(row_shape)
        self.encoder, self.decoder = encoder, decoder
        self.code = Unit(encoder.width, code, activation=code_activation)
        self.output = nn.Linear(decoder.width, width)
        initialise(self.output, activation=None)

    def encode(self, x: Tensor) -> Tensor:
        """See CodingNet."""
        steps = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x  # (B, height, channels * width)
        _, after = self.encoder(steps, _zeros(self.encoder, steps))
        return self.code(after[0][:, -1])

    def decode(self, codes: Tensor) -> Tensor:
        """See CodingNet."""
        given = codes[:, None].expand(-1, self.num_steps, -1)
        steps, _ = self.decoder(given, _zeros(self.decoder, codes))
        again: Tensor = self.output(steps)
        if len(self.row_shape) == 2:
            return again
        channels, _, width = self.row_shape
        return again.unflatten(2, (channels, width)).transpose(1, 2)


def _steps(row_shape: Sizes[int]) -> tuple[int, int]:
    """T and D of a row."""
    if len(row_shape) == 2:
        return row_shape[0], row_shape[1]
    channels, height, width = row_shape
    return height, channels * width


def _zeros(layers: Layers, like: Tensor) -> State:
    shape = (like.shape[0], layers.num_layers * layers.num_directions, layers.num_units)
    return tuple(like.new_zeros(shape) for _ in range(layers.num_states))


class SequenceAutoencoderSpec(CodingSpec):
    """Recurrent autoencoder: one net reads a sequence into a code, another writes it again."""

    reads = reading(input=(Sequence, Image))
    kind: Literal["sequence_autoencoder"] = "sequence_autoencoder"
    cell: CellName = Field("gru", description="of the encoder and of the decoder")
    hidden: PositiveInt = Field(128, description="units of each layer")
    layers: PositiveInt = Field(1, description="layers of cells, one on the other, on either side")
    code_activation: UnitName = Field("linear", description="what the code is squashed by")

    def check(self, signature: Signature) -> None:
        """Raise UserError where rows are no sequences, or differ in length."""
        super().check(signature)
        column = signature["input"]
        if isinstance(column, Sequence) and column.length is None:
            raise UserError(
                "model.kind",
                f"{self.kind} writes sequences of one length, but those of the data differ",
                "cut or pad them to one length",
            )

    def build(self, signature: Signature) -> SequenceAutoencoder:
        """The module: rows of `signature.input_shape` -> the same shape."""
        cells = CELLS[self.cell](hidden=self.hidden, layers=self.layers)
        return SequenceAutoencoder(
            signature.input_shape,
            encoder=cells.make_layers(_steps(signature.input_shape)[1]),
            decoder=cells.make_layers(self.code),
            code=self.code,
            code_activation=self.code_activation,
        )
