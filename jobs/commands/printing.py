"""What `manta show`, `models`, `recipes` and `data` print."""

import json
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.table import Table

from cluster.data.manifest import Manifest
from cluster.recipe.loading import builtin_recipes, dump_recipe, load_recipe
from cluster.recipe.recipe import Recipe
from cluster.runs.summary import Summary
from cluster.runtime.limits import size
from jobs.commands.showing_sweep import Plan
from nn_models import tables, zoo


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


def print_summary(
    recipe: Recipe, manifest: Manifest, summary: Summary, plan: Plan | None = None, *, as_json: bool
) -> None:
    """The resolved recipe, its layers, steps and memory, and the plan of its sweep."""
    if as_json:
        signature = manifest.signature
        facts = {
            "recipe": recipe.model_dump(mode="json"),
            "input_shape": signature.input_shape,
            "condition_shape": signature.condition_shape,
            "num_outputs": signature.num_outputs if "target" in signature else None,
            "layers": [vars(layer) for layer in summary.layers],
            **{name: value for name, value in vars(summary).items() if name != "layers"},
            "sweep": plan.facts() if plan else None,
        }
        print(json.dumps(facts))
        return
    console = _console()
    console.print(dump_recipe(recipe), markup=False)
    table = Table("layer", "kind", "output of a row", "parameters", box=None, pad_edge=False, header_style="bold")
    for layer in summary.layers:
        shape = " x ".join(str(size) for size in layer.output_shape)
        table.add_row(layer.name, layer.kind, shape, f"{layer.num_parameters:,}" if layer.num_parameters else "")
    console.print(table)
    rows = ", ".join(f"{count:,} {split}" for split, count in summary.rows.items())
    console.print()
    console.print(f"rows             {rows}; {_shape(manifest)}")
    console.print(f"parameters       {summary.num_parameters:,}")
    console.print(f"steps            {summary.steps_per_epoch:,} an epoch, {summary.num_steps:,} in all")
    parts = {"weights and optimizer": summary.parameter_bytes, "activations": summary.activation_bytes}
    text = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    each = "both halves" if "halves" in recipe.model.gives else "a worker"
    console.print(f"memory, about    {text} {each}; data {size(summary.data_bytes)}")
    if plan:
        plan.print_on(console)


def print_models(*, as_json: bool) -> None:
    """Each model with a line about it."""
    summaries = tables.summaries()
    if as_json:
        print(json.dumps(summaries))
        return
    _pairs(summaries)


def print_model(name: str, *, as_json: bool) -> None:
    """The fields of one model, with what its class says of it."""
    rows = tables.field_table(name)
    if as_json:
        print(json.dumps([row._asdict() for row in rows]))
        return
    console = _console()
    console.print((zoo.MODELS[name].__doc__ or "").strip(), markup=False)
    console.print()
    table = Table("field", "type", "default", "meaning", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def print_recipes(*, as_json: bool) -> None:
    """Each built-in recipe with the first comment in its file."""
    comments = {name: text.splitlines()[0].lstrip("# ") for name, text in builtin_recipes().items()}
    if as_json:
        loaded = {name: load_recipe(name) for name in comments}
        facts = {n: {"about": comments[n], "model": r.model.kind, "data": r.data.kind} for n, r in loaded.items()}
        print(json.dumps(facts))
        return
    _pairs(comments)


def print_manifest(where: str, manifest: Manifest, *, as_json: bool, verified: bool = False) -> None:
    """What a prepared data set holds."""
    if as_json:
        print(json.dumps({"path": where, **manifest.content()}))
        return
    console = _console()
    console.print(f"data set         {where}", markup=False)
    console.print(f"source           {manifest.source}; {_shape(manifest)}", markup=False)
    for split, shards in manifest.splits.items():
        total = size(sum(shard.bytes for shard in shards))
        groups = len(manifest.row_groups(split))
        console.print(f"{split:16} {manifest.rows(split):,} rows in {len(shards)} shards, {groups} row groups, {total}")
    if manifest.class_names:
        more = ", …" if len(manifest.class_names) > 20 else ""
        console.print(f"classes          {', '.join(manifest.class_names[:20])}{more}", markup=False)
    for line in manifest.unknown_tokens():
        console.print(f"unknown          {line}", markup=False)
    for stored in manifest.columns.values():
        if 0 < len(stored.mean) <= 4:
            console.print(f"mean, deviation  {_numbers(stored.mean)}; {_numbers(stored.std)}")
    if verified:
        console.print("checksums        match")


def print_outcome(
    metrics: Mapping[str, float | None], facts: Mapping[str, object], *, file: TextIO | None = None
) -> None:
    """Metrics, then facts, in two columns; what is None is left out, but a metric is then not finite."""
    figures = {name: "not finite" if value is None else f"{value:.4f}" for name, value in metrics.items()}
    shown = figures | {name: fact for name, fact in facts.items() if fact is not None}
    width = max(map(len, shown))
    for name, value in shown.items():
        print(f"{name:{width}}  {value}", file=file)


def _pairs(rows: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, text)
    _console().print(table)


def _shape(manifest: Manifest) -> str:
    """What a row holds: in short where these are numbers of one shape and one thing to predict."""
    columns = {name: stored.column for name, stored in manifest.columns.items()}
    arrays = [column.scaled and column.layout == "dense" for name, column in columns.items() if name != "target"]
    if "target" not in columns or not columns["target"].predicted or not all(arrays):
        return manifest.signature.describe()
    shape, num = f"{_by(columns['input'].row_shape)} {manifest.columns['input'].dtype}", columns["target"].num_outputs
    kind = "numbers" if not manifest.class_names else "class" if num == 1 else "classes"
    if "condition" in columns:
        return f"{_by(columns['condition'].row_shape)} -> {shape} of {num} {kind}"
    return f"{shape} to {num} {kind}"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
