"""Gradients: how much of a small change of a recurrent state comes through to the last step, by its distance from it.

Shapes: T steps, B rows, D inputs of a step, H units.
"""

import copy

import torch
from torch import Tensor

from nn_models.recurrence import Cell, CellLayers, State

STATE_NAMES = ("h", "c")
MOST_STEPS = 1000  # of a row that are gone through, from its first
MOST_ROWS = 16
MOST_PRODUCTS = 1_000_000_000  # of float64 numbers in U h, of all cells and steps: about a second of one core


def derivative_norms(layers: CellLayers, x: Tensor, state: State, lengths: Tensor | None) -> dict[str, Tensor]:
    """`LAYER.DIRECTION.STATE` -> (T + 1,) float64: the norm of ds[T]/ds[t] at T - t = 0, 1 ... T, as a mean over rows.

    `x` (B, T, D), the states (B, L * S, H) and the lengths (B,) are as `Layers.forward` takes them. A layer is looked
    at on its own: what it reads is held as it is. See `norms_of_cell`; so many rows and steps are taken as
    MOST_PRODUCTS allows, whatever the size of the net.
    """
    layers = copy.deepcopy(layers).eval().cpu().double().requires_grad_(False)
    weights = sum(cell.weight_hh.numel() for cell in layers.cells if isinstance(cell, Cell))
    num_steps = max(1, min(x.shape[1], MOST_STEPS, MOST_PRODUCTS // weights))
    num_rows = max(1, min(len(x), MOST_ROWS, MOST_PRODUCTS // (weights * num_steps)))
    x = x[:num_rows, :num_steps].detach().cpu().double()
    state = tuple(part[:num_rows].detach().cpu().double() for part in state)
    ends = torch.full((num_rows,), num_steps) if lengths is None else lengths[:num_rows].cpu().clamp(max=num_steps)
    x = x[:, : int(ends.max())]
    found = {}
    generator = torch.Generator().manual_seed(0)
    for layer, direction, cell, steps, before, _ in layers.scans(x, state, None if lengths is None else ends):
        for name, norms in norms_of_cell(cell, steps, before, ends, generator=generator).items():
            found[f"{layer}.{direction}.{name}"] = norms
    return found


@torch.enable_grad()
def norms_of_cell(
    cell: Cell, steps: Tensor, before: State, ends: Tensor, *, generator: torch.Generator, cell_path: bool = False
) -> dict[str, Tensor]:
    """The states by name -> (T + 1,): the norm of ds[T]/ds[t] by T - t, from 0 on (Bengio et al. 1994).

    With a random direction u of length 1 for each row, one pass back over all steps gives J' u with J = ds[T]/ds[t] for
    every t. Its length is at most the largest singular value of J; the mean of its square over directions is
    |J|^2 / H in Frobenius' norm, that of the singular values. The norm here is the root of that mean over rows: 1 where
    J is orthogonal. J itself would take H passes.

    `steps` (T, B, D) are what the cell reads, `before` (B, H) the states it begins with, `ends` (B,) each row's T. A
    derivative by h[t] is taken with c[t] as it is, one by c[t] through all that c[t] acts on; with `cell_path`
    nothing goes through h, so that of an LSTM's c is the product of its forget gates.
    """
    state = tuple(part.detach().clone().requires_grad_() for part in before)
    states = [state]
    for projected in cell.project(steps).unbind(0):
        state = cell.step(projected, (state[0].detach(), *state[1:]) if cell_path else state)
        states.append(state)
    rows = torch.arange(len(ends))
    place = ends - torch.arange(len(states))[:, None]  # (T + 1, B): t by T - t, below 0 before a row's beginning
    found = {}
    for name, nodes in zip(STATE_NAMES, zip(*states, strict=True), strict=False):
        direction = torch.randn(nodes[0].shape, dtype=nodes[0].dtype, generator=generator)
        direction = direction / direction.norm(dim=1, keepdim=True)
        last = torch.stack(nodes)[ends, rows]
        parts = torch.autograd.grad(last, nodes, direction, retain_graph=True, allow_unused=True)
        squares = torch.stack(
            [torch.zeros(len(ends)).to(last) if part is None else part.square().sum(1) for part in parts]
        )
        squares = squares.gather(0, place.clamp(min=0))
        inside = place >= 0
        found[name] = ((squares * inside).sum(1) / inside.sum(1)).sqrt()
    return found
