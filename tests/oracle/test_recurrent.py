"""Recurrent nets against torch.nn, the papers' equations in NumPy, and themselves with other padding."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nn_models import zoo
from nn_models.batch import Ragged
from nn_models.columns import Label, Labels, Numbers, Sequence, Tokens
from nn_models.recurrence import Cell, CellLayers, ElmanCell, FusedLayers, GRUCell, LSTMCell, PeepholeCell
from nn_models.signature import Signature

ROWS, STEPS, INPUTS, UNITS = 4, 7, 3, 5
LENGTHS = torch.tensor([7, 2, 5, 1])
CELLS = {
    "tanh": (lambda d: ElmanCell(d, UNITS), lambda **k: nn.RNN(INPUTS, UNITS, **k)),
    "relu": (
        lambda d: ElmanCell(d, UNITS, activation="relu"),
        lambda **k: nn.RNN(INPUTS, UNITS, nonlinearity="relu", **k),
    ),
    "lstm": (lambda d: LSTMCell(d, UNITS), lambda **k: nn.LSTM(INPUTS, UNITS, **k)),
    "gru": (lambda d: GRUCell(d, UNITS), lambda **k: nn.GRU(INPUTS, UNITS, **k)),
}
# one product of float32 numbers of size 1 is off by 1e-7; up to 7 steps and 2 layers add up to less than 1e-5
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def by_cells(make, theirs: nn.RNNBase) -> CellLayers:
    """Our cells with the weights of torch's module."""
    directions = 1 + theirs.bidirectional
    widths = [INPUTS, *[UNITS * directions] * (theirs.num_layers - 1)]
    cells = [make(width) for width in widths for _ in range(directions)]
    ours = CellLayers(cells, num_layers=theirs.num_layers, bidirectional=theirs.bidirectional, dropout=0.0)
    names = [f"l{layer}{end}" for layer in range(theirs.num_layers) for end in ("", "_reverse")[:directions]]
    weights = theirs.state_dict()
    for cell, name in zip(ours.cells, names, strict=True):
        own = {key: weights[f"{key}_{name}"] for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        cell.load_state_dict(own, strict=False)
    return ours.to(next(theirs.parameters()).dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "ragged"])
@pytest.mark.parametrize(("layers", "bidirectional"), list(itertools.product([1, 2], [False, True])))
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_torchs(kind, layers, bidirectional, lengths, dtype):
    torch.manual_seed(0)
    make, their_module = CELLS[kind]
    theirs = their_module(num_layers=layers, bidirectional=bidirectional, batch_first=True).to(dtype)
    ours, fused = by_cells(make, theirs), FusedLayers(theirs)
    x = torch.randn(ROWS, STEPS, INPUTS, dtype=dtype, requires_grad=True)
    state = [torch.randn(ROWS, layers * (1 + bidirectional), UNITS, dtype=dtype) for _ in range(ours.num_states)]
    before = tuple(part.transpose(0, 1).contiguous() for part in state)
    before = before if len(before) == 2 else before[0]
    if lengths is None:
        wanted, ends = theirs(x, before)
    else:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        wanted, ends = theirs(packed, before)
        wanted, _ = pad_packed_sequence(wanted, batch_first=True, total_length=STEPS)
    ends = [end.transpose(0, 1) for end in (ends if isinstance(ends, tuple) else [ends])]
    weight = torch.randn_like(wanted)
    (slope,) = torch.autograd.grad((wanted * weight).sum() + sum(end.sum() for end in ends), x, retain_graph=True)
    for layers_of in (ours, fused):
        found, after = layers_of(x, tuple(state), lengths)
        (found_slope,) = torch.autograd.grad((found * weight).sum() + sum(end.sum() for end in after), x)
        for one, other in zip([found, found_slope, *after], [wanted, slope, *ends], strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_state_dicts_exchange_with_torchs(kind, layers, bidirectional):
    signature = Signature(columns={"input": Sequence(width=INPUTS), "target": Label(size=2)})
    model = {"kind": kind, "hidden": UNITS, "layers": layers, "bidirectional": bidirectional}
    core = zoo.build(model, signature).layers.core
    theirs = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind](
        INPUTS, UNITS, num_layers=layers, bidirectional=bidirectional
    )
    theirs.load_state_dict(core.state_dict(), strict=True)
    core.load_state_dict(theirs.state_dict(), strict=True)


# -- peepholes -----------------------------------------------------------------------------------------------------


def seeded(make, dtype=torch.float64):
    torch.manual_seed(1)
    return make().to(dtype)


def states(count, dtype=torch.float64):
    return tuple(torch.randn(ROWS, UNITS, dtype=dtype, requires_grad=True) for _ in range(count))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_without_its_peepholes_it_is_an_lstm(dtype):
    peephole = seeded(lambda: PeepholeCell(INPUTS, UNITS), dtype)
    nn.init.zeros_(peephole.peepholes)
    lstm = nn.LSTM(INPUTS, UNITS).to(dtype)
    names = [name for name, _ in peephole.named_parameters() if name != "peepholes"]
    lstm.load_state_dict({f"{name}_l0": peephole.get_parameter(name) for name in names})
    x, (h, c) = torch.randn(STEPS, ROWS, INPUTS, dtype=dtype), states(2, dtype)
    wanted, (_, end) = lstm(x, (h[None], c[None]))
    found = peephole.scan(x, (h, c))
    torch.testing.assert_close(found[0], wanted, atol=TOLERANCES[dtype], rtol=0)
    torch.testing.assert_close(found[1][-1], end[0], atol=TOLERANCES[dtype], rtol=0)
    ours = torch.autograd.grad(found[0].square().sum(), [peephole.get_parameter(name) for name in names])
    theirs = torch.autograd.grad(wanted.square().sum(), [lstm.get_parameter(f"{name}_l0") for name in names])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=20 * TOLERANCES[dtype], rtol=0)  # sums over 28 rows of steps


def test_the_written_derivative_is_that_of_the_equations():
    cell = seeded(lambda: PeepholeCell(INPUTS, UNITS))
    x = torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
    before = states(2)
    sought = [x, *before, *cell.parameters()]
    weights = [torch.randn(STEPS, ROWS, UNITS, dtype=torch.float64) for _ in range(2)]
    found, wanted = (
        torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, scan(x, before), strict=True)), sought)
        for scan in (cell.scan, lambda x, state: Cell.scan(cell, x, state))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)  # float64, 7 steps


@pytest.mark.parametrize(
    "make",
    [
        lambda: PeepholeCell(2, 3),
        lambda: PeepholeCell(2, 3, layer_norm=True),
        lambda: LSTMCell(2, 3, layer_norm=True),
        lambda: GRUCell(2, 3, reset="before"),
        lambda: GRUCell(2, 3, layer_norm=True),
        lambda: ElmanCell(2, 3, activation="sigmoid"),
    ],
)
def test_gradcheck(make):
    cell = seeded(make)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    before = tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(cell.num_states))
    weights = dict(cell.named_parameters())

    def run(x, *rest):
        given = dict(zip(weights, rest[len(before) :], strict=True))
        return torch.func.functional_call(
            _Scan(cell), {f"cell.{k}": v for k, v in given.items()}, (x, rest[: len(before)])
        )

    assert torch.autograd.gradcheck(run, (x, *before, *weights.values()))


class _Scan(nn.Module):
    def __init__(self, cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x, state):
        return self.cell.scan(x, state)


# -- the papers' equations in NumPy ----------------------------------------------------------------------------------


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def numbers(cell):
    return {name: weight.detach().numpy() for name, weight in cell.named_parameters()}


def test_the_gru_of_the_paper():
    cell = seeded(lambda: GRUCell(INPUTS, UNITS, reset="before"))
    w, x, (h,) = numbers(cell), torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64), states(1)
    (found,) = cell.scan(x, (h,))
    (w_r, w_z, w_n), (u_r, u_z, u_n) = (np.split(w[f"weight_{end}"], 3) for end in ("ih", "hh"))
    b_r, b_z, b_n = np.split(w["bias_ih"] + w["bias_hh"], 3)
    h = h.detach().numpy()
    for step, said in zip(x.numpy(), found.detach().numpy(), strict=True):
        r, z = sigmoid(step @ w_r.T + h @ u_r.T + b_r), sigmoid(step @ w_z.T + h @ u_z.T + b_z)  # eq. 5 and 6
        n = np.tanh(step @ w_n.T + (r * h) @ u_n.T + b_n)  # eq. 8
        h = z * h + (1 - z) * n  # eq. 7
        np.testing.assert_allclose(said, h, atol=1e-12)


def test_the_peephole_lstm_of_the_paper():
    cell = seeded(lambda: PeepholeCell(INPUTS, UNITS))
    w, x, (h, c) = numbers(cell), torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64), states(2)
    found, cells = cell.scan(x, (h, c))
    p_i, p_f, p_o = w["peepholes"]
    h, c = h.detach().numpy(), c.detach().numpy()
    for step, said, kept in zip(x.numpy(), found.detach().numpy(), cells.detach().numpy(), strict=True):
        gates = step @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"]
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)  # i and f see c[t-1]
        h = sigmoid(o + p_o * c) * np.tanh(c)  # o sees c[t]
        np.testing.assert_allclose(said, h, atol=1e-12)
        np.testing.assert_allclose(kept, c, atol=1e-12)


def test_layer_normalisation_is_of_each_product_on_its_own():
    cell = seeded(lambda: ElmanCell(INPUTS, UNITS, layer_norm=True))
    w, x, (h,) = numbers(cell), torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64), states(1)
    (found,) = cell.scan(x, (h,))
    h = h.detach().numpy()

    def normal(values):
        return (values - values.mean(1, keepdims=True)) / np.sqrt(values.var(1, keepdims=True) + 1e-5)

    for step, said in zip(x.numpy(), found.detach().numpy(), strict=True):
        h = np.tanh(normal(step @ w["weight_ih"].T) + w["bias_ih"] + normal(h @ w["weight_hh"].T) + w["bias_hh"])
        np.testing.assert_allclose(said, h, atol=1e-12)


# -- whole nets ----------------------------------------------------------------------------------------------------


def stream(size, length) -> Signature:
    """Words, and the word that follows each."""
    return Signature(columns={"input": Tokens(size=size, length=length), "target": Labels(size=size, length=length)})


MODELS = [
    {"kind": "rnn", "hidden": 5, "activation": "linear"},
    {"kind": "rnn", "hidden": 5, "pool": "mean"},
    {"kind": "lstm", "hidden": 5, "layers": 2, "bidirectional": True, "initial_state": "learned"},
    {"kind": "lstm", "hidden": 5, "layer_norm": True, "bidirectional": True},
    {"kind": "peephole_lstm", "hidden": 5, "layers": 2, "bidirectional": True, "pool": "max"},
    {"kind": "gru", "hidden": 5, "bidirectional": True, "pool": "mean"},
    {"kind": "gru", "hidden": 5, "reset": "before", "layers": 2},
]
TARGETS = {"row": Label(size=3), "numbers": Numbers(size=2), "steps": Labels(size=4)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["kind"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_padding_and_the_order_of_rows_change_nothing(model, target, data):
    """Each row on its own, without any padding, is what it is in a batch."""
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    words = data.draw(st.booleans())
    column = Tokens(size=9) if words else Sequence(width=3)
    torch.manual_seed(0)
    net = zoo.build(model, Signature(columns={"input": column, "target": TARGETS[target]})).double().eval()
    total = int(lengths.sum())
    values = torch.randint(9, (total,)) if words else torch.randn(total, 3, dtype=torch.float64)
    longest = int(lengths.max()) + data.draw(st.integers(0, 3))  # more padding than is needed
    rows = values.split(lengths.tolist())
    alone = [net(Ragged(row, torch.tensor([len(row)]), len(row))) for row in rows]
    order = data.draw(st.permutations(range(len(rows))))
    together = net(Ragged(torch.cat([rows[row] for row in order]), lengths[list(order)], longest))
    torch.testing.assert_close(together, torch.cat([alone[row] for row in order]), atol=1e-12, rtol=0)
    if len(set(lengths.tolist())) == 1:
        even = torch.stack([rows[row] for row in order])
        torch.testing.assert_close(net(even), together, atol=1e-12, rtol=0)


@pytest.mark.parametrize("model", [m for m in MODELS if not m.get("bidirectional")], ids=lambda model: model["kind"])
def test_windows_that_carry_their_state_are_the_whole(model):
    torch.manual_seed(0)
    net = zoo.build(model, stream(9, 8)).double().eval()
    words = torch.randint(9, (3, 8))
    whole = net(words).unflatten(0, (3, 8))
    first, state = net(words[:, :5], keep_state=True)
    second = net(words[:, 5:], state)
    both = torch.cat([first.unflatten(0, (3, 5)), second.unflatten(0, (3, 3))], 1)
    torch.testing.assert_close(both, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("model", "count"),
    [  # G (H (D + H) + 2 H) of each layer and direction, (H S + 1) K of the output
        ({"kind": "rnn", "hidden": 20}, 20 * (28 + 20) + 40 + 21 * 10),
        ({"kind": "lstm", "hidden": 20}, 4 * (20 * (28 + 20) + 40) + 21 * 10),
        ({"kind": "peephole_lstm", "hidden": 20}, 4 * (20 * (28 + 20) + 40) + 60 + 21 * 10),
        ({"kind": "gru", "hidden": 20}, 3 * (20 * (28 + 20) + 40) + 21 * 10),
        (
            {"kind": "gru", "hidden": 20, "layers": 2, "bidirectional": True},
            2 * 3 * (20 * (28 + 20) + 40) + 2 * 3 * (20 * (40 + 20) + 40) + 41 * 10,
        ),
    ],
)
def test_counts_of_parameters(model, count):
    net = zoo.build(model, Signature(input_shape=(1, 28, 28), num_outputs=10))
    assert sum(weight.numel() for weight in net.parameters()) == count


def test_images_are_read_row_by_row_or_pixel_by_pixel():
    torch.manual_seed(0)
    signature = Signature(input_shape=(2, 3, 4), num_outputs=3)
    image = torch.randn(2, 2, 3, 4)
    for kind, steps in (
        ("rows", torch.stack([image[:, :, row].transpose(1, 2).flatten(1) for row in range(3)], 1)),
        ("pixels", torch.stack([image[:, :, row, column] for row in range(3) for column in range(4)], 1)),
    ):
        net = zoo.build({"kind": "gru", "hidden": 4, "images": kind}, signature)
        torch.testing.assert_close(net(image), net(steps))
        other = zoo.build({"kind": "gru", "hidden": 4, "images": kind, "permutation": 5}, signature)
        other.load_state_dict(net.state_dict(), strict=False)
        torch.testing.assert_close(other(image), net(steps[:, other.order]))
        assert sorted(other.order.tolist()) == list(range(steps.shape[1]))
        again = zoo.build({"kind": "gru", "hidden": 4, "images": kind, "permutation": 5}, signature)
        assert torch.equal(again.order, other.order)


@pytest.mark.parametrize("kind", ["orthogonal", "identity"])
def test_first_weights(kind):
    signature = Signature(input_shape=(1, 8, 8), num_outputs=3)
    for model in ("rnn", "lstm", "peephole_lstm", "gru"):
        net = zoo.build({"kind": model, "hidden": 6, "recurrent_init": kind, "layers": 2}, signature)
        weights = {name: weight for name, weight in net.layers.named_parameters() if "weight_hh" in name}
        assert weights
        for weight in weights.values():
            for gate in weight.split(6):
                torch.testing.assert_close(gate @ gate.t(), torch.eye(6), atol=1e-5, rtol=0)  # float32
                assert kind == "orthogonal" or torch.equal(gate, torch.eye(6))
        biases = [bias for name, bias in net.layers.named_parameters() if "bias_ih" in name]
        forget = 1.0 if "lstm" in model else 0.0
        assert all(bias[6:12].eq(forget).all() and bias[:6].eq(0).all() for bias in biases)


@pytest.mark.parametrize("model", [{"kind": "peephole_lstm"}, {"kind": "lstm"}, {"kind": "gru", "reset": "before"}])
def test_half_precision_is_near_single(model):
    torch.manual_seed(0)
    net = zoo.build({"hidden": 8, "layers": 2, **model}, Signature(input_shape=(1, 8, 8), num_outputs=3))
    x = torch.randn(5, 1, 8, 8)
    wanted = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(x)
    found.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in net.parameters())
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0)  # bfloat16 keeps 8 bits
