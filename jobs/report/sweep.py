"""The page of a sweep: gathers its trials, what their values did, and the schedule, and renders report.html."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from cluster.recipe.distributions import Distribution
from cluster.recipe.loading import parse_yaml
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.tuning.budget import Budget, budget
from cluster.tuning.space import Space
from cluster.tuning.target import target
from jobs.report.charts import figure, number, words
from jobs.report.files import AbsentError, is_number, left_out, mapping
from jobs.report.importance import Importance, importance
from jobs.report.rendering import duration, flat, write_page
from jobs.report.sweep_charts import MAX_LINES, bars, curves, parallel
from jobs.report.trials import Trial, best_of, columns_of, ranked, read_trials, shown
from nn_models.spec import validate

MAX_ROWS = 1000
MAX_REASONS = 50
MAX_LINEAGES = 100
STATUSES = ("finished", "pruned", "failed", "invalid", "running", "waiting")


class _Section(NamedTuple):
    """What the recipe tells of the sweep; nothing where it cannot be read."""

    metric: str | None = None
    mode: str = "min"
    scheduler: str | None = None
    searcher: str | None = None
    num_trials: int | None = None
    drawn_from: Sequence[tuple[str, Distribution]] = ()
    cost: Budget | None = None


def write_sweep_report(folder: Folder) -> str:
    """Write SWEEP/report.html, as write_report says."""
    notes: list[str] = []
    text = None
    recipe: dict[str, Any] = {}
    section = _Section()
    with left_out(notes, "The recipe", file="recipe.yaml"):
        text = folder.read_bytes("recipe.yaml").decode(errors="replace")
        recipe = mapping(yaml.safe_load(text))
        section = _section(validate(Recipe, parse_yaml(text, name="recipe.yaml")))
    result: dict[str, Any] = {}
    with left_out(notes, "The final result", file="result.json"):
        result = mapping(json.loads(folder.read_bytes("result.json")))
    environment: list[tuple[str, str]] = []
    with left_out(notes, "The environment", file="environment.json"):
        environment = list(flat(mapping(json.loads(folder.read_bytes("environment.json")))))
    best_recipe = None
    with left_out(notes, "The best recipe", file="best.yaml"):
        best_recipe = folder.read_bytes("best.yaml").decode(errors="replace")
    metric = str(result["metric"]) if isinstance(result.get("metric"), str) else section.metric
    mode = str(result["mode"]) if result.get("mode") in ("min", "max") else section.mode
    trials = read_trials(folder, metric, notes)
    if len(trials) > MAX_LINES:
        notes.append(f"The lines of {len(trials) - MAX_LINES} trials: the best {MAX_LINES} are drawn.")
    chosen = mapping(result.get("best")).get("trial")
    best = next((trial for trial in trials if trial.index == chosen), None) or best_of(trials, mode)
    columns = columns_of(trials, section.drawn_from)
    metric_name = metric or "value"
    rungs = section.cost.rungs if section.cost else ()
    drawn = coordinates = found = None
    with left_out(notes, "The curves", file="metrics.jsonl"):
        drawn = curves(trials, best, metric_name, mode, rungs)
    with left_out(notes, "Parallel coordinates", file="trial.json"):
        coordinates = parallel(trials, best, columns, metric_name, mode)
    too_few = None
    try:
        with left_out(notes, "Importance", file="trial.json"):
            found = _importance(trials, columns)
    except _TooFew as reason:
        too_few = str(reason)
    return write_page(
        folder,
        "sweep.html",
        name=str(recipe.get("name") or folder.path.rsplit("/", 1)[-1]),
        kinds={part: mapping(recipe.get(part)).get("kind") for part in ("model", "data", "objective")},
        status=str(result.get("status") or "unfinished"),
        metric=metric_name,
        better="less" if mode == "min" else "more",
        figures=list(_figures(best, metric_name, trials)),
        facts=[(label, value) for label, value in _facts(section, result, trials, best) if value],
        best=best,
        best_recipe=best_recipe,
        population=bool(best and len(best.lineage) > 1),
        curves=drawn,
        parallel=coordinates,
        importance=found,
        bars=bars(found) if found else None,
        too_few=too_few,
        scheduler=section.scheduler,
        rungs=_rungs(trials, rungs, metric_name, mode),
        stopped=_stopped(trials, rungs),
        lineage=_lineage(best),
        lineages=_lineages(trials),
        reasons=_reasons(trials),
        paths=[column.path for column in columns],
        rows=_rows(trials, [column.path for column in columns], best, metric_name, mode),
        retried=any(trial.attempts > 1 for trial in trials),
        num_hidden=max(0, len(trials) - MAX_ROWS),
        recipe=text,
        environment=environment,
        notes=notes,
    )


class _TooFew(Exception):
    """What the page says in the place of importance."""


def _importance(trials: Sequence[Trial], columns: Sequence[Any]) -> Importance:
    try:
        return importance(trials, columns)
    except AbsentError as reason:
        raise _TooFew(str(reason)) from None


def _section(recipe: Recipe) -> _Section:
    if recipe.sweep is None:
        return _Section()
    space, found = Space(recipe.sweep), target(recipe)
    return _Section(
        metric=found.metric,
        mode=found.mode,
        scheduler=recipe.sweep.scheduler,
        searcher=recipe.sweep.searcher,
        num_trials=space.num_trials,
        drawn_from=list(space.distributions()),
        cost=budget(recipe),
    )


def _figures(best: Trial | None, metric: str, trials: Sequence[Trial]) -> Iterator[tuple[str, str]]:
    if best and best.value is not None:
        yield f"best {words(metric)}", figure(metric, best.value)
        tested = sorted(name for name in best.metrics if name.startswith("test/"))
        for name in sorted(tested, key=lambda name: name.endswith("/loss"))[:2]:
            yield words(name), figure(name, best.metrics[name])
    yield "trials", str(len(trials))


def _facts(
    section: _Section, result: Mapping[str, Any], trials: Sequence[Trial], best: Trial | None
) -> Iterator[tuple[str, str | None]]:
    yield "best trial", None if best is None else str(best.index)
    for status in STATUSES:
        count = sum(trial.status == status for trial in trials)
        yield status, str(count) if count else None
    planned = section.num_trials
    yield "planned", f"{planned} trials" if planned and planned != len(trials) else None
    yield "searcher", section.searcher
    yield "scheduler", section.scheduler
    spent = sum(trial.epochs for trial in trials)
    yield "epochs trained", f"{number(spent)} of {number(section.cost.longest)} at most" if section.cost else str(spent)
    yield "at once", number(result.get("concurrency"))
    yield "duration", duration(result.get("wall_s"))
    yield "trials per hour", number(result.get("trials_per_hour"))


def _rungs(trials: Sequence[Trial], rungs: Sequence[int], metric: str, mode: str) -> list[list[str]]:
    """ASHA's rungs: epoch, how many reached it, went on, were stopped there; the best there."""
    choose = max if mode == "max" else min
    rows = []
    for rung in rungs:
        reached = [trial for trial in trials if trial.epochs >= rung]
        stopped = sum(trial.status == "pruned" and trial.epochs == rung for trial in reached)
        went_on = sum(trial.epochs > rung for trial in reached)
        there = [value for trial in reached for epoch, value in trial.curve if epoch == rung]
        best = figure(metric, choose(there)) if there else ""
        rows.append([str(rung), str(len(reached)), str(went_on), str(stopped), best])
    return rows


def _stopped(trials: Sequence[Trial], rungs: Sequence[int]) -> list[list[str]]:
    """Of a scheduler without rungs: epochs and how many trials were stopped after so many."""
    if rungs:
        return []
    ends = [trial.epochs for trial in trials if trial.status == "pruned"]
    return [[str(epoch), str(ends.count(epoch))] for epoch in sorted(set(ends))][:MAX_REASONS]


def _lineage(best: Trial | None) -> list[list[str]]:
    """The best trial's past: epoch, the trial whose state it had, the values from then on."""
    if best is None or len(best.lineage) < 2:
        return []
    return [
        [str(epoch + 1), str(trial), ", ".join(f"{path} {shown(value)}" for path, value in values.items())]
        for epoch, trial, values in best.lineage
    ]


def _lineages(trials: Sequence[Trial]) -> list[list[str]]:
    """Each trial that has taken over a state: its number, and whose it had from which epoch on."""
    return [
        [str(trial.index), " → ".join(f"{source} (epoch {epoch + 1})" for epoch, source, _ in trial.lineage)]
        for trial in trials
        if len(trial.lineage) > 1
    ][:MAX_LINEAGES]


def _reasons(trials: Sequence[Trial]) -> list[list[str]]:
    """Why trials failed or were refused: status, reason, which."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for trial in trials:
        if trial.error:
            found[trial.status, trial.error[:1000]].append(trial.index)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1])))
    return [[status, reason, ", ".join(map(str, indices))] for (status, reason), indices in ordered[:MAX_REASONS]]


def _rows(
    trials: Sequence[Trial], paths: Sequence[str], best: Trial | None, metric: str, mode: str
) -> list[dict[str, Any]]:
    """The table of trials: the best first, those without a value last."""
    valued = ranked(trials, mode)
    ordered = [trial for trial in [*valued, *(t for t in trials if t.value is None)] if trial is not best]
    return [
        {
            "index": trial.index,
            "status": trial.status,
            "best": trial is best,
            "value": "" if trial.value is None else figure(metric, trial.value),
            "epochs": trial.epochs or "",
            "values": [(shown(trial.values[path]) if path in trial.values else "") for path in paths],
            "numbers": [is_number(trial.values.get(path)) for path in paths],
            "attempts": trial.attempts or "",
            "time": duration(trial.time_s) if trial.time_s else "",
        }
        for trial in [*([best] if best else []), *ordered][:MAX_ROWS]
    ]
