"""Check: whether a file computes what the model does, by both on the same rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.inference.export.formats.base import Computes, Rows
from cluster.inference.export.graph import ELSE, Graph, Port
from nn_models.errors import UserError

TOLERANCE = 1e-4  # float32 in another order of sums
NUM_ROWS = (1, 2, 33)  # a file takes any number of them


def made_rows(graph: Graph, num: int, *, seed: int = 0) -> list[Tensor]:
    """So many rows as files hold them, drawn at random: of the moments of the training rows, or any of the numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [_made(graph, port, num, generator) for port in graph.inputs]


def _made(graph: Graph, port: Port, num: int, generator: torch.Generator) -> Tensor:
    shape = (num, *port.shape)
    if port.dtype == "uint8":
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    stored = graph.columns.get(port.name)
    if stored is not None and not stored.column.scaled:
        return torch.randint(stored.column.num_outputs, shape, generator=generator, dtype=getattr(torch, port.dtype))
    values = torch.randn(shape, generator=generator)
    if stored is None or not stored.mean:
        return values
    dims = (-1, 1, 1) if len(port.shape) == 3 else (-1,)
    return values * torch.tensor(stored.std).reshape(dims) + torch.tensor(stored.mean).reshape(dims)


def refuse_noise(graph: Graph) -> None:
    """Raise UserError where the graph does not give the same of the same rows: there is nothing to compare then."""
    rows = made_rows(graph, 2)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = graph(*rows)
        torch.manual_seed(1)
        again = graph(*rows)
    if not all(torch.equal(one, other) for one, other in zip(first, again, strict=True)):
        raise UserError(
            "--format",
            "the model cannot be a graph: it draws numbers of its own each time it is called (dropout that stays), so "
            "no two answers are the same",
            ELSE,
        )


def largest_difference(graph: Graph, computes: Computes, *, num_rows: Sequence[int] = NUM_ROWS) -> float:
    """Between what the graph and a file give for the same rows, so many at once.

    At the scale at which the net gives numbers, standard deviations for instance and not bytes, and of what is beyond 1
    there relative to it. Of classes it is by how much the likeliest is likelier than the one that the file has. Raises
    UserError where the file gives other shapes, or cannot take so many rows.
    """
    worst = 0.0
    for num in num_rows:
        rows = made_rows(graph, num, seed=num)
        with torch.no_grad():
            wanted = graph(*rows)
        worst = max(worst, *_differences(graph, wanted, _computed(computes, rows)))
    return worst


def _computed(computes: Computes, rows: Rows) -> list[Tensor]:
    try:
        with torch.no_grad():
            return computes(rows)
    except Exception as error:  # a runtime's own
        what = " ".join(str(error).split())[:300]
        raise UserError("--format", f"the file cannot be computed for {len(rows[0])} rows ({what})", ELSE) from error


def _differences(graph: Graph, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> list[float]:
    differences, units = [], graph.units()
    by_name = dict(zip((port.name for port in graph.outputs), wanted, strict=True))
    for port, there, here in zip(graph.outputs, wanted, found, strict=True):
        if there.shape != here.shape or there.dtype != here.dtype:
            what = f"{port.name} is {here.dtype} {tuple(here.shape)} and not {there.dtype} {tuple(there.shape)}"
            raise UserError("--format", f"the file gives something else: {what}", ELSE)
        if there.dtype.is_floating_point:
            unit = units.get(port.name, torch.ones(()))
            difference = (here - there).abs() / torch.maximum(there.abs(), unit)
        else:
            each = by_name["probabilities"]
            taken = each.gather(-1, here.clamp(0, each.shape[-1] - 1)[..., None])[..., 0]
            difference = each.amax(-1) - taken
        # what is no number in one and a number in the other is as far off as can be
        same = (here == there) | (here.isnan() & there.isnan())
        difference = torch.where(same, 0.0, difference.nan_to_num(torch.inf, torch.inf, torch.inf))
        differences.append(float(difference.max()) if difference.numel() else 0.0)
    return differences
