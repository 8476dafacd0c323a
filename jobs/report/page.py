"""The page: gathers figures, curves and the sections of a run's evidence and renders report.html."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from cluster.storage import Folder
from jobs.report.charts import MAX_CHARTS, SPLITS, Chart, figure, metric_charts, number, words
from jobs.report.files import BROKEN, AbsentError, is_number, left_out, mapping, read_records
from jobs.report.rendering import duration, flat, fragment, write_page
from jobs.report.sections import SECTIONS, chosen
from jobs.report.sections.section import Run
from nn_models.errors import UserError

MAX_FIGURES = 6  # at the head of the page


def write_report(run: str) -> str:
    """Write report.html of a run or a sweep from what it left behind, and return its path.

    `run` is the directory, a local path or a URI. Nothing in it is executed: JSON, YAML (safe) and safetensors only.
    Whatever is missing or broken is left out of the page and named at its end.
    Raises UserError where the directory is neither or cannot be written.
    """
    folder = Folder(run)
    if _is_sweep(folder):
        from jobs.report.sweep import write_sweep_report

        return write_sweep_report(folder)
    _refuse_what_is_no_run(folder)
    found = Run(folder)
    notes = found.notes
    recipe_text = None
    with left_out(notes, "The recipe", file="recipe.yaml"):
        recipe_text = folder.read_bytes("recipe.yaml").decode(errors="replace")
        found.recipe = mapping(yaml.safe_load(recipe_text))
    with left_out(notes, "The final result", file="result.json"):
        found.result = mapping(json.loads(folder.read_bytes("result.json")))
    environment: list[tuple[str, str]] = []
    with left_out(notes, "The environment", file="environment.json"):
        environment = list(flat(mapping(json.loads(folder.read_bytes("environment.json")))))
    recipe, result = found.recipe, found.result
    best = mapping(result.get("best"))
    marks = [mark for section in SECTIONS for mark in section.marks(found)]
    charts: list[Chart] = []
    with left_out(notes, "The curves", file="metrics.jsonl"):
        found.records, num_unreadable = read_records(folder.read_bytes("metrics.jsonl"))
        if num_unreadable:
            notes.append(f"Lines of metrics.jsonl that cannot be read: {num_unreadable}.")
        charts = metric_charts(found.records, best_step=best.get("step"), marks=marks)
        if not charts:
            raise AbsentError("metrics.jsonl holds no finite value")
        if len(charts) > MAX_CHARTS:
            notes.append(f"The curves: only {MAX_CHARTS} of the {len(charts)} metrics are drawn.")
    sections = chosen(found)
    above: list[Markup] = []
    below: list[Markup] = []
    for section in sections:
        with left_out(notes, section.title, file=section.file):
            if values := section.read(found):
                (above if section.above else below).append(fragment(section.template, **values))
    return write_page(
        folder,
        "report.html",
        name=str(recipe.get("name") or folder.path.rsplit("/", 1)[-1]),
        kinds={part: mapping(recipe.get(part)).get("kind") for part in ("model", "data", "objective")},
        status=str(result.get("status") or "unfinished"),
        error=result.get("error"),
        figures=_figures(mapping(result.get("metrics")), next((s.figures for s in sections if s.figures), ())),
        facts=[(label, value) for label, value in _facts(recipe, result) if value],
        charts=charts[:MAX_CHARTS],
        best=words(str(best["metric"])) if best.get("metric") else None,
        marks=marks,
        above=above,
        below=below,
        recipe=recipe_text,
        environment=environment,
        result=json.dumps(result, indent=2, ensure_ascii=False) if result else None,
        notes=notes,
    )


def _is_sweep(folder: Folder) -> bool:
    """Whether a directory is a sweep's. A run may have a recipe with a section sweep, too, but then metrics as well."""
    if "trials" in folder.names():
        return not folder.exists("metrics.jsonl")
    if folder.exists("metrics.jsonl") or not folder.exists("recipe.yaml"):
        return False
    try:
        return isinstance(mapping(yaml.safe_load(folder.read_text("recipe.yaml"))).get("sweep"), dict)
    except BROKEN:
        return False


def _refuse_what_is_no_run(folder: Folder) -> None:
    names = folder.names()
    if {"recipe.yaml", "result.json", "metrics.jsonl"} & set(names):
        return
    if not folder.exists():
        raise UserError(str(folder), "no such directory", "name the directory of a run, as given to --run")
    runs = [name for name in names[:100] if (folder / name).exists("recipe.yaml")]
    fix = f"name one of the runs in it: {', '.join(runs[:5])}" if runs else "name the directory given to --run"
    raise UserError(str(folder), "not a run (it holds no recipe.yaml, metrics.jsonl or result.json)", fix)


def _figures(metrics: Mapping[str, Any], first: Sequence[str]) -> list[tuple[str, str]]:
    """The numbers that matter most: of the test split where there is one; those in `first`, or the loss last."""
    for split in reversed(SPLITS):
        found = {name: value for name, value in metrics.items() if name.startswith(f"{split}/") and is_number(value)}
        if found:
            names = sorted(found, key=lambda name: name.endswith("/loss"))
            if first:
                names = [name for name in (f"{split}/{bare}" for bare in first) if name in found]
            return [(words(name), figure(name, found[name])) for name in names[:MAX_FIGURES]]
    return []


def _facts(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    train, best = mapping(recipe.get("train")), mapping(result.get("best"))
    yield "parameters", number(result.get("num_parameters"))
    for section in ("optimizer", "schedule"):
        kind = mapping(recipe.get(section)).get("kind")
        yield section, None if kind is None else str(kind)
    workers = result.get("num_workers", result.get("world_size"))
    yield "workers", "none (in one process)" if workers == 0 else number(workers)
    done, planned = number(result.get("epochs")), number(train.get("epochs"))
    yield "epochs", f"{done} of {planned}" if done and planned and done != planned else done or planned
    yield "steps", number(result.get("steps"))
    yield "global batch", number(train.get("global_batch_size"))
    yield "duration", duration(result.get("wall_s"))
    yield "to the first step", duration(result.get("time_to_first_step_s"))
    yield "rows per second", number(result.get("rows_per_s"))
    yield "restarts", number(result.get("restarts"))
    if isinstance(result.get("rollbacks"), list):
        yield "rollbacks", number(len(result["rollbacks"]))
    if is_number(best.get("value")):
        name = str(best.get("metric", "value"))
        epoch = best.get("epoch")
        if is_number(epoch) and "metrics" not in best:  # of an earlier version, which counted from 0
            epoch += 1
        place = f", epoch {number(epoch)}" if is_number(epoch) else ""
        yield f"best {words(name)}", f"{figure(name, best['value'])}{', untrained' if best.get('step') == 0 else place}"
