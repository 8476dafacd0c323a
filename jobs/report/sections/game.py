"""Game: what the page tells of a GAN: samples, quality beside its floor, rollbacks, an early end."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.data.manifest import Manifest
from jobs.report.charts import FLOORS, Mark, figure, number, steps_per_epoch, words
from jobs.report.files import Tensors, is_number, left_out, mapping
from jobs.report.samples import COLUMNS, FOLDER, read_samples
from jobs.report.sections.section import MODEL, Run, Section
from nn_models.spec import validate
from nn_models.zoo import MODELS

# Metrics of what is made, in the order in which they matter: all in the table, some at the head of the page, and the
# first that is known of each grid.
QUALITY = ("frechet_distance", "kernel_distance", "label_agreement", "l1", "diversity")
FIGURES = ("frechet_distance", "frechet_floor", "label_agreement", "l1", "diversity")
OF_A_GRID = ("frechet_distance", "l1", "diversity")
MAX_ROLLBACKS = 50


class QualityRow(NamedTuple):
    """One metric of the generator before training, at its best, and of real rows in its place."""

    name: str
    values: list[str]


class Rollback(NamedTuple):
    """Once that both halves returned to their best."""

    when: str
    to: str
    reason: str
    factor: str


def _read(run: Run) -> dict[str, Any]:
    best = best_look(run.result, run.records)
    data = None
    with left_out(run.notes, "The best generator's weights", file=MODEL):
        described = Tensors(run.folder, MODEL).metadata.get("data")
        data = None if described is None else validate(Manifest, json.loads(described), prefix="data")
    samples = None
    if data is None or len(data.signature.input_shape) > 1:  # rows of features are no pictures
        epoch_steps = steps_per_epoch(run.records)
        samples = read_samples(
            run.folder, run.records, run.notes, best_step=best.get("step"), epoch_steps=epoch_steps, told=OF_A_GRID
        )
    heads, quality = quality_table(best, run.result, run.records)
    ended = run.result.get("ended")
    return {
        "ended": ended if isinstance(ended, str) else None,
        "heads": heads,
        "quality": quality,
        "rollbacks": rollbacks(run.result, run.records),
        "samples": samples,
        "grid": described_grid(str(mapping(run.recipe.get("model")).get("kind")), data) if data else "",
    }


def is_game(run: Run) -> bool:
    """Whether a run is a GAN's, by whatever of it is there."""
    return (
        mapping(run.recipe.get("objective")).get("kind") == "adversarial"
        or "rollbacks" in run.result
        or any("discriminator_loss" in record for record in run.records)
    )


def described_grid(model: str, data: Manifest) -> str:
    """What stands where in a grid, by what the model is given and the names of the classes."""
    if "condition" in data.signature:
        return "In each row, twice: the image given, what was made from it, and the true one."
    names = data.class_names
    given = getattr(MODELS.get(model), "given", None)
    if given == "target" and 0 < len(names) <= COLUMNS:
        return f"The classes from left to right: {', '.join(names * (COLUMNS // len(names)))}."
    return ""


def best_look(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best generator's line of metrics; of a run that has not ended the best one so far."""
    looks = [record for record in records if record.get("split") == "validation"]
    step = mapping(result.get("best")).get("step")
    if is_number(step):
        return next((dict(look) for look in looks if look["step"] == step), {"step": step})
    for name in ("frechet_distance", "l1"):
        known = [look for look in looks if is_number(look.get(name))]
        if known:
            return dict(min(known, key=lambda look: look[name]))
    return dict(looks[-1]) if looks else {}


def quality_table(
    best: Mapping[str, Any], result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[QualityRow]]:
    """Column heads, and a row a metric; columns of which nothing is known are left out."""
    first = next((record for record in records if record.get("split") == "validation" and record["step"] == 0), {})
    untrained = mapping(result.get("untrained")) or first
    tested = {
        name.removeprefix("test/"): value
        for name, value in mapping(result.get("metrics")).items()
        if name.startswith("test/")
    }
    floors = {metric: floor for floor, metric in FLOORS.items()}
    columns = {
        "untrained": untrained,
        "best": best,
        "floor": {metric: best.get(floor, untrained.get(floor)) for metric, floor in floors.items()},
        "best, test split": tested,
        "floor, test split": {metric: tested.get(floor) for metric, floor in floors.items()},
    }
    known = {head: values for head, values in columns.items() if any(is_number(values.get(name)) for name in QUALITY)}
    rows = [
        QualityRow(words(name), [_cell(name, values.get(name)) for values in known.values()])
        for name in QUALITY
        if any(is_number(values.get(name)) for values in known.values())
    ]
    return list(known), rows


def _cell(name: str, value: Any) -> str:
    return figure(name, value) if is_number(value) else ""


def rollbacks(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Rollback]:
    """All of result.json's that can be told."""
    epoch = steps_per_epoch(records)
    return [
        Rollback(
            when=_place(entry["step"], epoch),
            to=_place(entry["to_step"], epoch) if is_number(entry.get("to_step")) else "",
            reason=str(entry.get("reason", "")),
            factor=number(entry.get("learning_rate_factor")) or "",
        )
        for entry in _entries(result)
    ]


def _marks(run: Run) -> list[Mark]:
    """The same, for the charts."""
    return [
        Mark(entry["step"], f"rollback at step {number(entry['step'])}: {entry.get('reason', '')}")
        for entry in _entries(run.result)
    ]


def _entries(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    found = result.get("rollbacks")
    for entry in found[:MAX_ROLLBACKS] if isinstance(found, list) else []:
        if is_number(mapping(entry).get("step")):
            yield entry


def _place(step: float, epoch: float) -> str:
    if not step:
        return "the untrained halves"
    return f"step {number(step)}" + (f" (epoch {number(float(step / epoch))})" if epoch else "")


SECTION = Section(
    name="game",
    template="game.html",
    read=_read,
    title="What it makes",
    file=FOLDER,
    left_by=is_game,
    above=True,
    figures=FIGURES,
    marks=_marks,
)
