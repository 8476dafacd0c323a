"""export: a run's best model as one file with scaling and decoding in it, compared with the model first."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import RunFailed
from cluster.inference.export.check import NUM_ROWS, TOLERANCE, largest_difference, made_rows, refuse_noise
from cluster.inference.export.formats import Format
from cluster.inference.export.graph import Graph, graph_of
from cluster.runs.opened import open_model
from cluster.runs.predictor import OpenedModel

TRACED_ROWS = 3  # of an example; not 1, which torch.export takes for a number of rows that stays


@dataclass(frozen=True)
class Exported:
    """A file's content, how far it is from the model on how many rows, and what goes in and comes out."""

    content: bytes
    difference: float
    rows: int
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]


def export(run: str, *, format: Format) -> Exported:
    """The best model of a run as a file of this format, from RUN/model alone.

    It takes what the data's files hold, any number of rows, and computes in float32. Raises UserError where the model
    cannot be had so, with the reason, and RunFailed where what the file gives is not what the model gives.
    """
    format.refuse_missing()
    model = open_model(run)
    graph = graph_of(model).requires_grad_(False)
    refuse_noise(graph)
    content = format.written(graph, made_rows(graph, TRACED_ROWS), metadata(model, graph))
    difference = largest_difference(graph, format.opened(content, graph))
    if not difference <= TOLERANCE:
        raise RunFailed(
            f"{run}: as {format.name} the model gives other numbers, by {difference:.2g} and so more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    inputs, outputs = (tuple(port.plain() for port in ports) for ports in (graph.inputs, graph.outputs))
    return Exported(content, difference, sum(NUM_ROWS), inputs, outputs)


def metadata(model: OpenedModel, graph: Graph) -> Mapping[str, str]:
    """What stands in the file beside the graph, as texts: lists and mappings as JSON."""
    recipe = model.recipe
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "model": recipe.model.kind,
        "objective": recipe.objective.kind,
        "source": model.manifest.source,
        "inputs": [port.plain() for port in graph.inputs],
        "outputs": [port.plain() for port in graph.outputs],
        "classes": list(graph.classes),
        "vocabulary": list(graph.vocabulary),
        "best": dict(model.best),
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
