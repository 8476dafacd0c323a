"""How derivatives pass through time, against theory: bounds, orthogonal matrices, forget gates, exact Jacobians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nn_models import gradients
from nn_models.gradients import derivative_norms, norms_of_cell
from nn_models.recurrence import CellLayers, ElmanCell, FusedLayers, GRUCell, LSTMCell, PeepholeCell

ROWS, STEPS, INPUTS, UNITS = 6, 12, 3, 5
CELLS = {
    "rnn": ElmanCell,
    "lstm": LSTMCell,
    "peephole_lstm": PeepholeCell,
    "gru, after": GRUCell,
    "gru, before": lambda d, h: GRUCell(d, h, reset="before"),
    "lstm, normalised": lambda d, h: LSTMCell(d, h, layer_norm=True),
}


def made(make, num_units=UNITS, seed=0):
    torch.manual_seed(seed)
    return make(INPUTS, num_units).double().requires_grad_(False)


def norms(cell, *, rows=ROWS, steps=STEPS, ends=None, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, rows, INPUTS, dtype=torch.float64, generator=generator)
    before = tuple(
        torch.randn(rows, cell.num_units, dtype=torch.float64, generator=generator) for _ in range(cell.num_states)
    )
    ends = torch.full((rows,), steps) if ends is None else ends
    return norms_of_cell(cell, x, before, ends, generator=generator, **options), x, before


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.1, 2.0))
def test_those_of_a_tanh_net_are_below_the_power_of_the_matrixs_norm(seed, scale):
    cell = made(ElmanCell, seed=seed)
    cell.weight_hh.mul_(scale)
    largest = torch.linalg.matrix_norm(cell.weight_hh, 2)
    found = norms(cell, seed=seed)[0]["h"]
    bounds = largest ** torch.arange(STEPS + 1)
    assert (found <= bounds * (1 + 1e-12)).all()  # float64, rounded 12 times
    assert found[0] == pytest.approx(1, abs=1e-12)


def test_those_of_a_linear_net_with_an_orthogonal_matrix_are_1():
    cell = made(lambda d, h: ElmanCell(d, h, activation="linear"), num_units=32)
    nn.init.orthogonal_(cell.weight_hh)
    found = norms(cell, steps=300)[0]["h"]
    torch.testing.assert_close(found, torch.ones(301).double(), atol=1e-11, rtol=0)  # float64, 300 products


def products_of_forget_gates(cell, x, state):
    """(T + 1, B, H) by T - t: of the gates from t + 1 to T."""
    forget = []
    for projected in cell.project(x):
        state, gates = cell.step_and_gates(projected, state)
        forget.append(gates[cell.gate_names.index("forget")])
    return torch.stack([torch.ones_like(forget[0]), *torch.stack(forget).flip(0).cumprod(0)])


def test_the_cell_path_of_an_lstm_is_the_product_of_its_forget_gates():
    one = made(LSTMCell, num_units=1)
    found, x, before = norms(one, rows=1, cell_path=True)
    wanted = products_of_forget_gates(one, x, before)[:, 0, 0]
    torch.testing.assert_close(found["c"], wanted, atol=0, rtol=1e-12)  # float64, 12 products
    cell = made(LSTMCell)  # of several units J is diagonal: |J' u| lies between the least and the largest product
    found, x, before = norms(cell, rows=1, cell_path=True)
    products = products_of_forget_gates(cell, x, before)
    assert (found["c"] <= products.amax((1, 2)) * (1 + 1e-12)).all()
    assert (found["c"] >= products.amin((1, 2)) * (1 - 1e-12)).all()


def test_a_net_without_recurrent_weights_has_the_cell_path_alone():
    cell = made(LSTMCell)
    cell.weight_hh.zero_()
    whole, path = norms(cell)[0], norms(cell, cell_path=True)[0]
    torch.testing.assert_close(whole["c"], path["c"], atol=0, rtol=1e-12)  # float64, in another order
    assert whole["h"][1:].abs().max() == 0  # h[t] acts on nothing


@pytest.mark.parametrize("kind", CELLS)
def test_the_mean_over_directions_is_the_norm_of_the_exact_jacobian(kind):
    cell = made(CELLS[kind])
    rows = 4000  # the same row, in as many directions
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 1, INPUTS, dtype=torch.float64, generator=generator).expand(-1, rows, -1)
    before = tuple(torch.zeros(rows, UNITS, dtype=torch.float64) for _ in range(cell.num_states))
    found = norms_of_cell(cell, x, before, torch.full((rows,), STEPS), generator=generator)
    states = [tuple(part[:1] for part in before)]
    for projected in cell.project(x[:, :1]):
        states.append(cell.step(projected, states[-1]))
    steps_back = 4
    projected = cell.project(x[:, :1])[-steps_back:]

    def last(part, number):
        state = list(states[-1 - steps_back])
        state[number] = part
        if number:  # h[t] = o tanh(c[t]) is a function of c[t]: take the step to it again
            *_, gates = cell.step_and_gates(cell.project(x[:, :1])[-steps_back - 1], states[-2 - steps_back])
            out = gates[cell.gate_names.index("output")]
            if kind == "peephole_lstm":
                logit = torch.logit(out) + cell.peepholes[2] * (part - states[-1 - steps_back][1])
                out = torch.sigmoid(logit)
            state[0] = out * torch.tanh(cell.norm_c(part))
        for step in projected:
            state = cell.step(step, tuple(state))
        return state[number]

    for number, name in enumerate(gradients.STATE_NAMES[: cell.num_states]):
        jacobian = torch.autograd.functional.jacobian(
            lambda part, n=number: last(part, n), states[-1 - steps_back][number]
        )
        wanted = jacobian.reshape(UNITS, UNITS).norm() / UNITS**0.5
        # the mean of 4,000 squares, each at most UNITS times its mean: deviation below 2.5 %, of the root half of it
        assert found[name][steps_back].item() == pytest.approx(wanted.item(), rel=0.05)


def test_each_row_counts_from_its_own_end():
    cell = made(GRUCell)
    ends = torch.tensor([12, 3, 7])
    found, x, before = norms(cell, rows=3, ends=ends)
    longer = torch.cat((x, torch.randn(5, 3, INPUTS, dtype=torch.float64)))  # padding has no say
    generator = torch.Generator().manual_seed(0)
    torch.randn(STEPS, 3, INPUTS, dtype=torch.float64, generator=generator)
    torch.randn(3, UNITS, dtype=torch.float64, generator=generator)
    again = norms_of_cell(cell, longer, before, ends, generator=generator)["h"]
    torch.testing.assert_close(again[:13], found["h"], atol=0, rtol=1e-12)
    assert again[13:].isnan().all()  # no row is that long


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_fused_layers_are_looked_at_by_cells_with_their_weights(kind, bidirectional):
    torch.manual_seed(0)
    fused = FusedLayers(kind(INPUTS, UNITS, num_layers=2, bidirectional=bidirectional, batch_first=True))
    cells, directions = fused.by_cells(), 1 + bidirectional
    x, lengths = torch.randn(ROWS, STEPS, INPUTS), torch.tensor([12, 3, 5, 12, 1, 7])
    state = tuple(torch.randn(ROWS, 2 * directions, UNITS) for _ in range(fused.num_states))
    for ends in (None, lengths):
        (ours, after), (theirs, wanted) = cells(x, state, ends), fused(x, state, ends)
        torch.testing.assert_close((ours, after), (theirs, wanted), atol=1e-5, rtol=0)  # float32, 12 steps, 2 layers
    found = derivative_norms(cells, x, state, lengths)
    names = "hc"[: fused.num_states]
    assert set(found) == {f"{layer}.{way}.{name}" for layer in (0, 1) for way in range(directions) for name in names}
    assert all(len(norms) == STEPS + 1 and norms.isfinite().all() for norms in found.values())
    assert all(norms[0] == pytest.approx(1) for norms in found.values())


def test_a_large_net_over_long_rows_is_looked_at_in_bounded_work(monkeypatch):
    monkeypatch.setattr(gradients, "MOST_PRODUCTS", 4 * UNITS**2 * 2 * 20)
    torch.manual_seed(0)
    layers = CellLayers([LSTMCell(INPUTS, UNITS)], num_layers=1, bidirectional=False, dropout=0.0)
    seen = []
    monkeypatch.setattr(gradients, "norms_of_cell", lambda cell, steps, *_, **__: seen.append(steps.shape) or {})
    state = tuple(torch.zeros(ROWS, 1, UNITS) for _ in range(2))
    derivative_norms(layers, torch.randn(ROWS, 20, INPUTS), state, None)
    derivative_norms(layers, torch.randn(ROWS, 5000, INPUTS), state, None)
    assert [tuple(shape[:2]) for shape in seen] == [(20, 2), (40, 1)]
