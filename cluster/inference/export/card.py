"""Card: what a model is, what it was trained on, how good it is and how to use it, as a README.md for a hub."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.data.manifest import StoredColumn
from cluster.recipe.loading import dump_recipe
from cluster.runs.opened import Forecaster, Generator, Parser
from cluster.runs.predictor import OpenedModel, Predictor
from nn_models.batch import fields_of

NUMPY = "import numpy as np\n"
MOST_NAMES = 50  # of classes that are listed


def card(model: OpenedModel, result: Mapping[str, Any] | None) -> str:
    """The card of a run's model. `result` is what result.json says, None where the run has none."""
    recipe, manifest = model.recipe, model.manifest
    kind, objective = recipe.model, recipe.objective
    parameters = sum(weight.numel() for weight in model.net.parameters())
    tags = ["manta", kind.kind, objective.kind, manifest.source]
    facts = {
        "model": f"`{kind.kind}`: {_first_line(type(kind))}",
        "objective": f"`{objective.kind}`: {_first_line(type(objective))}",
        "parameters": f"{parameters:,}",
        "data": f"`{manifest.source}`: {manifest.signature.describe()}",
        "classes": _some(model.classes),
        "weights of": _weights_of(model.best, recipe.train.epochs),
        **{f"takes `{name}`": what for name, what in model.takes.items()},
        "gives": model.gives,
    }
    lines = [
        "---",
        "library_name: manta",
        f"tags: {json.dumps(tags)}",
        "---",
        f"# {recipe.name}",
        "",
        *_table("", "", facts),
        "",
        "## Figures",
        "",
        *_figures(model, result),
        "",
        "## How to use it",
        "",
        "With `pip install manta-train`, in this folder:",
        "",
        "```python",
        *snippet(model).splitlines(),
        "```",
        "",
        "Scaling is the model's part: it takes what files hold. `model.net` is the bare PyTorch module, which reads",
        "scaled numbers. Weights are safetensors and the recipe is YAML: loading them runs no code from them.",
        "",
        "## How it was trained",
        "",
        f"`manta train model/recipe.yaml` trains it again, where the data is at hand (seed {recipe.train.seed}):",
        "",
        "```yaml",
        *dump_recipe(recipe).splitlines(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def snippet(model: OpenedModel) -> str:
    """Python that opens the model in the current folder and asks it about rows that are made up."""
    lines = ["from cluster import open_model", "", 'model = open_model(".")', "print(model)  # what it takes and gives"]
    if isinstance(model, Parser):
        return "\n".join([*lines, 'print(model.parse("which of these words belong together"))'])
    if isinstance(model, Generator):
        if not model.starts or model.given is None:
            return "\n".join([*lines, "print(model(4, seed=0).shape)  # four rows that it makes"])
        given = _rows(model.given)
        return "\n".join([NUMPY, *lines, "", f"print(model(given={given}).shape)  # the rows that it makes of two"])
    assert isinstance(model, Predictor)
    columns = {name: model.manifest.columns[name] for name in model.reads}
    rows = ", ".join(f"{name}={_rows(stored)}" for name, stored in columns.items())
    needs = [NUMPY] if "np." in rows else []
    ask = "forecast" if isinstance(model, Forecaster) else "predict"
    rows = rows.replace("input=", "past=") if isinstance(model, Forecaster) else rows
    return "\n".join([*needs, *lines, "", f"print(model.{ask}({rows}))  # of two rows"])


def _rows(stored: StoredColumn) -> str:
    """Two rows of a column, as Python writes them."""
    column = stored.column
    if column.layout == "dense":
        return f"np.zeros({(2, *column.row_shape)}, np.{stored.dtype})"
    with torch.device("cpu"):
        fields, lengths = fields_of(column.imagine(2))
    assert lengths is not None
    apart = {name: values.split(lengths.tolist()) for name, values in fields.items()}
    if len(apart) == 1:
        return str([_plain(row) for row in next(iter(apart.values()))])
    return str([{name: _plain(rows[number]) for name, rows in apart.items()} for number in range(2)])


def _plain(values: Tensor) -> Any:
    return values.tolist()


def _figures(model: OpenedModel, result: Mapping[str, Any] | None) -> list[str]:
    metrics = (result or {}).get("metrics") or model.best.get("metrics") or {}
    figures = {f"`{name}`": "not finite" if value is None else f"{value:.4f}" for name, value in metrics.items()}
    return [*_table("metric", "value", figures)] if figures else ["None were measured: the run has not ended."]


def _table(first: str, second: str, rows: Mapping[str, str]) -> list[str]:
    shown = {name: text.replace("|", "\\|").replace("\n", " ") for name, text in rows.items() if text}
    return [f"| {first} | {second} |", "|---|---|", *(f"| {name} | {text} |" for name, text in shown.items())]


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:MOST_NAMES]) + f", … ({len(names):,} in all)" * (len(names) > MOST_NAMES)


def _weights_of(best: Mapping[str, Any], epochs: int) -> str:
    if not best.get("step"):
        return "before training"
    return f"epoch {best['epoch']} of {epochs}, the best by {best['metric']}"


def _first_line(described: type) -> str:
    return (inspect.getdoc(described) or "").split("\n")[0]
