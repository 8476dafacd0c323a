"""Inspection: what there is to see inside a recurrent net on a few rows: how its gradients decay, what its gates do.

Shapes: B rows of the batch, T steps, D numbers of a step, H units, G gates.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nn_models.batch import Batch, Ragged
from nn_models.gradients import derivative_norms
from nn_models.recurrence import CellLayers, State

if TYPE_CHECKING:  # it imports this file
    from nn_models.recurrent import RecurrentNet

MOST_STEPS = 256  # of the row whose gates are kept, from its first
MOST_UNITS = 128


@torch.no_grad()
def gates_over_time(layers: CellLayers, x: Tensor, state: State) -> dict[str, Tensor]:
    """`LAYER.DIRECTION.GATE` -> (T, H) between 0 and 1: all gates at each step of one row (1, T, D), as it reads them.

    Of more than MOST_UNITS units some are taken, at equal distances; cells without gates give nothing.
    """
    found: dict[str, Tensor] = {}
    for layer, direction, cell, steps, before, _ in layers.scans(x, state):
        over_time, now = [], before
        for projected in cell.project(steps).unbind(0):
            now, gates = cell.step_and_gates(projected, now)
            over_time.append(gates)
        some = torch.linspace(0, cell.num_units - 1, min(cell.num_units, MOST_UNITS)).round().long().to(x.device)
        for name, values in zip(cell.gate_names, zip(*over_time, strict=True), strict=True):
            found[f"{layer}.{direction}.{name}"] = torch.cat(values)[:, some]
    return found


@torch.no_grad()
def inspect(nets: Mapping[str, "RecurrentNet"], batch: Batch) -> dict[str, Tensor]:
    """What the sections `gradients` and `gates` of the report are made of, of these rows, on the CPU.

    The first of the nets is the one that is looked into, the others are compared with it by their names.

    gradients/NET/LAYER.DIRECTION.STATE   (T + 1,) float64: see derivative_norms
    gates/LAYER.DIRECTION.GATE            (T, H) uint8, 255 where a gate is open: on the first row
    gates/steps                           (T, D) float32 that it reads at each step of the row; (T,) int32 of words
    """
    found = {}
    for place, (name, net) in enumerate(nets.items()):
        steps, state, lengths = net.given(batch["input"])
        layers = net.layers.by_cells().to(steps.device).eval()
        for key, norms in derivative_norms(layers, steps, state, lengths).items():
            found[f"gradients/{name}/{key}"] = norms
        if place:
            continue
        num_steps = min(MOST_STEPS, steps.shape[1] if lengths is None else int(lengths[0]))
        row = steps[:1, :num_steps]
        for key, gates in gates_over_time(layers, row, tuple(part[:1] for part in state)).items():
            found[f"gates/{key}"] = (255 * gates).round().to(torch.uint8).cpu()
        read = row[0].float()
        if net.embedding is not None:  # the words themselves say more than the numbers that stand for them
            value = batch["input"]
            read = (value.values if isinstance(value, Ragged) else value[0])[:num_steps].int()
        found["gates/steps"] = read.cpu()
    return found
