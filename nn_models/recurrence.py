"""Recurrence: cells and their layers: Elman, LSTM, LSTM with peepholes, GRU; run over all steps of a batch.

Shapes: B rows of the batch, T steps of the longest, D inputs of a step, H units, G gates, L layers, S directions.
States are batch first, (B, L * S, H), layer after layer and in each the forward direction first.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nn_models.peepholes import PeepholeRecurrence, gate_scales

State = tuple[Tensor, ...]  # h alone, or h and c
StepActivation = Literal["tanh", "relu", "sigmoid", "linear"]
Reset = Literal["after", "before"]
RecurrentInit = Literal["uniform", "orthogonal", "identity"]

STEP_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "linear": lambda values: values}


class Cell(nn.Module):
    """Base of the cells: one layer in one direction, with the names and the layout of torch.nn's weights.

    With layer normalisation (Ba et al. 2016, eq. 20 to 22) what comes from the input and what comes from the state are
    normalised on their own before they are added.
    """

    gates: ClassVar[int] = 1
    num_states: ClassVar[int] = 1
    gate_names: ClassVar[tuple[str, ...]] = ()  # of those that lie between 0 and 1, as `step_and_gates` gives them

    def __init__(self, num_inputs: int, num_units: int, *, layer_norm: bool = False) -> None:
        super().__init__()
        self.num_units = num_units
        width = self.gates * num_units
        self.weight_ih = nn.Parameter(torch.empty(width, num_inputs))
        self.weight_hh = nn.Parameter(torch.empty(width, num_units))
        self.bias_ih = nn.Parameter(torch.empty(width))
        self.bias_hh = nn.Parameter(torch.empty(width))
        for weight in self.parameters():
            nn.init.uniform_(weight, -(num_units**-0.5), num_units**-0.5)  # as torch.nn's
        self.norm_ih = nn.LayerNorm(width, bias=False) if layer_norm else nn.Identity()
        self.norm_hh = nn.LayerNorm(width, bias=False) if layer_norm else nn.Identity()

    def project(self, x: Tensor) -> Tensor:
        """What the input gives to the gates, of all steps at once: (..., D) -> (..., G * H)."""
        return self.norm_ih(x @ self.weight_ih.t()) + self.bias_ih

    def recur(self, h: Tensor) -> Tensor:
        """What the state before gives to the gates: (B, H) -> (B, G * H)."""
        return self.norm_hh(h @ self.weight_hh.t()) + self.bias_hh

    def step_and_gates(self, projected: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        """The state after a step, of the projected input (B, G * H) and the state before; and the gates (B, H)."""
        raise NotImplementedError

    def step(self, projected: Tensor, state: State) -> State:
        """The state after a step: see `step_and_gates`."""
        return self.step_and_gates(projected, state)[0]

    def scan(self, x: Tensor, state: State) -> State:
        """The states after each step: (T, B, D) -> (T, B, H) each."""
        projected, states = self.project(x), []
        for gates in projected.unbind(0):
            state = self.step(gates, state)
            states.append(state)
        return tuple(torch.stack(parts) for parts in zip(*states, strict=True))


class ElmanCell(Cell):
    """h[t] = f(A [h[t-1], x[t]] + b) (Elman 1990)."""

    def __init__(
        self, num_inputs: int, num_units: int, *, activation: StepActivation = "tanh", layer_norm: bool = False
    ) -> None:
        super().__init__(num_inputs, num_units, layer_norm=layer_norm)
        self.activation = activation

    def step_and_gates(self, projected: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        """See Cell."""
        return (STEP_ACTIVATIONS[self.activation](projected + self.recur(state[0])),), ()


class LSTMCell(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with a forget gate (Gers et al. 2000).

    i, f, o = sigmoid(W x[t] + U h[t-1] + b)     g = tanh(W x[t] + U h[t-1] + b)
    c[t] = f c[t-1] + i g                        h[t] = o tanh(c[t])
    """

    gates, num_states = 4, 2
    gate_names = ("input", "forget", "output")

    def __init__(self, num_inputs: int, num_units: int, *, layer_norm: bool = False) -> None:
        super().__init__(num_inputs, num_units, layer_norm=layer_norm)
        self.norm_c = nn.LayerNorm(num_units) if layer_norm else nn.Identity()

    def step_and_gates(self, projected: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        """See Cell."""
        h, c = state
        i, f, g, o = (projected + self.recur(h)).chunk(4, -1)
        i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
        c = f * c + i * torch.tanh(g)
        return (o * torch.tanh(self.norm_c(c)), c), (i, f, o)


class PeepholeCell(LSTMCell):
    """LSTM whose gates see the cell (Gers & Schmidhuber 2000): i and f see c[t-1], o sees c[t].

    i = sigmoid(W x[t] + U h[t-1] + p_i c[t-1] + b)      f likewise
    o = sigmoid(W x[t] + U h[t-1] + p_o c[t] + b)
    """

    def __init__(self, num_inputs: int, num_units: int, *, layer_norm: bool = False) -> None:
        super().__init__(num_inputs, num_units, layer_norm=layer_norm)
        self.peepholes = nn.Parameter(torch.empty(3, num_units))  # of i, f, o
        nn.init.uniform_(self.peepholes, -(num_units**-0.5), num_units**-0.5)
        self.layer_norm = layer_norm

    def step_and_gates(self, projected: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        """See Cell."""
        h, c = state
        i, f, g, o = (projected + self.recur(h)).chunk(4, -1)
        of_i, of_f, of_o = self.peepholes
        i, f = torch.sigmoid(i + of_i * c), torch.sigmoid(f + of_f * c)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + of_o * c)
        return (o * torch.tanh(self.norm_c(c)), c), (i, f, o)

    def scan(self, x: Tensor, state: State) -> State:
        """See Cell. With its derivative written down, which takes a fifth to all of the time of autograd."""
        if self.layer_norm or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return super().scan(x, state)  # a graph to export is of torch's own operations
        scales = gate_scales(self.num_units, self.weight_hh)
        biases = (self.bias_ih + self.bias_hh) * scales
        projected = nn.functional.linear(x, self.weight_ih * scales[:, None], biases)
        # autocast projects in half precision; the recurrence itself stays in that of the weights
        given = [value.to(self.weight_hh.dtype) for value in (projected, *state)]
        h, c = PeepholeRecurrence.apply(*given, self.weight_hh * scales[:, None], self.peepholes)
        return h, c


class GRUCell(Cell):
    """Gated recurrent unit (Cho et al. 2014), with the reset gate applied after or before the product with U.

    r, z = sigmoid(W x[t] + U h[t-1] + b)        h[t] = (1 - z) n + z h[t-1]
    after:  n = tanh(W x[t] + b + r (U h[t-1] + b'))     as cuDNN and torch compute it
    before: n = tanh(W x[t] + b + U (r h[t-1]) + b')     Cho et al. 2014, eq. 8
    """

    gates = 3
    gate_names = ("reset", "update")

    def __init__(self, num_inputs: int, num_units: int, *, reset: Reset = "after", layer_norm: bool = False) -> None:
        super().__init__(num_inputs, num_units, layer_norm=layer_norm)
        self.reset = reset

    def step_and_gates(self, projected: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        """See Cell."""
        (h,), size = state, self.num_units
        if self.reset == "after":
            (of_r, of_z, of_n), (r, z, n) = projected.chunk(3, -1), self.recur(h).chunk(3, -1)
            r, z = torch.sigmoid(of_r + r), torch.sigmoid(of_z + z)
            return (torch.lerp(torch.tanh(of_n + r * n), h, z),), (r, z)
        weights, biases = self.weight_hh.split([2 * size, size]), self.bias_hh.split([2 * size, size])
        both = torch.sigmoid(projected[..., : 2 * size] + h @ weights[0].t() + biases[0])
        r, z = both.chunk(2, -1)
        n = torch.tanh(projected[..., 2 * size :] + (r * h) @ weights[1].t() + biases[1])
        return (torch.lerp(n, h, z),), (r, z)


class Layers(nn.Module):
    """Base: layers of cells over rows of steps, in one direction or in both; dropout between the layers."""

    num_states: int

    def __init__(self, *, num_units: int, num_layers: int, bidirectional: bool) -> None:
        super().__init__()
        self.num_units, self.num_layers, self.num_directions = num_units, num_layers, 1 + bidirectional

    @property
    def width(self) -> int:
        """Numbers that come out of each step."""
        return self.num_units * self.num_directions

    def forward(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """(B, T, D) and states (B, L * S, H) -> outputs (B, T, S * H), and the states after the last step of each row.

        `lengths` (B,) on the CPU are those of rows that end before T; what stands behind their ends changes nothing,
        and what comes out there is 0.
        """
        raise NotImplementedError

    def by_cells(self) -> "CellLayers":
        """The same layers by cells that can be asked step by step."""
        raise NotImplementedError


class Scanned(NamedTuple):
    """A layer in one direction over some rows: what it read (T, B, D), began with, and its states (T, B, H) each."""

    layer: int
    direction: int
    cell: Cell
    steps: Tensor
    before: State
    states: State


class FusedLayers(Layers):
    """By torch's kernels; `core` is torch.nn's module, with its weights by its names."""

    def __init__(self, core: nn.RNNBase) -> None:
        super().__init__(num_units=core.hidden_size, num_layers=core.num_layers, bidirectional=bool(core.bidirectional))
        self.core = core
        self.num_states = 2 if isinstance(core, nn.LSTM) else 1

    def forward(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """See Layers."""
        before: Any = tuple(part.transpose(0, 1).contiguous() for part in state)
        before = before if self.num_states == 2 else before[0]
        if lengths is None:
            outputs, after = self.core(x, before)
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            outputs, after = self.core(packed, before)
            outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])
        parts = after if self.num_states == 2 else (after,)
        return outputs, tuple(part.transpose(0, 1) for part in parts)

    def by_cells(self) -> "CellLayers":
        """The same layers step after step, with copies of the weights: for a look at what the kernels keep inside."""
        core, ends = self.core, ("", "_reverse")[: self.num_directions]
        cells: list[Cell] = []
        for layer in range(self.num_layers):
            for end in ends:
                weights = {
                    name: getattr(core, f"{name}_l{layer}{end}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                }
                num_inputs = weights["weight_ih"].shape[1]
                cell: Cell
                if isinstance(core, nn.LSTM):
                    cell = LSTMCell(num_inputs, self.num_units)
                elif isinstance(core, nn.GRU):
                    cell = GRUCell(num_inputs, self.num_units)
                else:
                    cell = ElmanCell(num_inputs, self.num_units, activation=cast(StepActivation, core.nonlinearity))
                cell.load_state_dict(weights)
                cells.append(cell.to(weights["weight_ih"]))
        both = self.num_directions == 2
        return CellLayers(cells, num_layers=self.num_layers, bidirectional=both, dropout=float(core.dropout))


class CellLayers(Layers):
    """By cells of this file, step after step: what torch has no kernels for."""

    def __init__(self, cells: Sequence[Cell], *, num_layers: int, bidirectional: bool, dropout: float) -> None:
        """`cells` are those of each layer, in each the forward direction first."""
        super().__init__(num_units=cells[0].num_units, num_layers=num_layers, bidirectional=bidirectional)
        self.cells = nn.ModuleList(cells)
        self.dropout = nn.Dropout(dropout)
        self.num_states = cells[0].num_states

    def forward(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """See Layers."""
        on_device = None if lengths is None else lengths.to(x.device)
        scanned = list(self.scans(x, state, lengths))
        ends = [tuple(_last(part, on_device) for part in one.states) for one in scanned]
        steps = _joined(scanned[-self.num_directions :], on_device)
        if on_device is not None:
            steps = steps * (torch.arange(x.shape[1], device=x.device)[:, None] < on_device)[..., None]
        return steps.transpose(0, 1), tuple(torch.stack(parts, 1) for parts in zip(*ends, strict=True))

    def by_cells(self) -> "CellLayers":
        """See Layers."""
        return self

    def scans(self, x: Tensor, state: State, lengths: Tensor | None = None) -> Iterator[Scanned]:
        """Layer after layer, the forward direction first; rows are turned where a direction reads from their ends."""
        on_device = None if lengths is None else lengths.to(x.device)
        steps = x.transpose(0, 1)  # (T, B, D)
        for layer in range(self.num_layers):
            found = []
            for direction in range(self.num_directions):
                number = layer * self.num_directions + direction
                cell = self.cells[number]
                assert isinstance(cell, Cell)
                there = turned(steps, on_device) if direction else steps
                before = tuple(part[:, number] for part in state)
                found.append(Scanned(layer, direction, cell, there, before, cell.scan(there, before)))
                yield found[-1]
            if layer + 1 < self.num_layers:
                steps = self.dropout(_joined(found, on_device))


def _joined(scanned: Sequence[Scanned], lengths: Tensor | None) -> Tensor:
    """What a layer gives: (T, B, S * H), each direction's outputs at the steps that they belong to."""
    outputs = [turned(one.states[0], lengths) if one.direction else one.states[0] for one in scanned]
    return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]


def turned(steps: Tensor, lengths: Tensor | None) -> Tensor:
    """(T, B, ...) with each row's steps from its last to its first; what stands behind a row's end stays there."""
    if lengths is None:
        return steps.flip(0)
    here = torch.arange(len(steps), device=steps.device)[:, None]
    there = lengths - 1 - here
    index = torch.where(there >= 0, there, here)
    return steps.gather(0, index[..., None].expand_as(steps))


def _last(steps: Tensor, lengths: Tensor | None) -> Tensor:
    """(T, B, H) -> (B, H): what stands at each row's last step."""
    if lengths is None:
        return steps[-1]
    return steps[lengths - 1, torch.arange(steps.shape[1], device=steps.device)]


def initialise_recurrence(layers: Layers, kind: RecurrentInit) -> None:
    """Draw the weights anew: what goes into each gate by Glorot & Bengio 2010, what goes from state to state by kind.

    A matrix for each gate: orthogonal (Saxe et al. 2014), which keeps the length of what it carries, or the identity
    (Le et al. 2015); biases are 0. `uniform` leaves all as torch.nn draws it, in [-1/sqrt(H), 1/sqrt(H)].
    """
    if kind == "uniform":
        return
    draw = nn.init.orthogonal_ if kind == "orthogonal" else nn.init.eye_
    for name, weight in layers.named_parameters():
        short = name.rpartition(".")[2]
        if short.startswith("weight_"):
            for gate in weight.detach().split(layers.num_units):
                (draw if short.startswith("weight_hh") else nn.init.xavier_uniform_)(gate)
        elif short.startswith("bias_"):
            nn.init.zeros_(weight)
