"""Sections: THE list of what the page can show of a run beside its curves, one file a kind of evidence."""

import json

from jobs.report.files import AbsentError, Tensors, left_out
from jobs.report.sections import (
    classes,
    codes,
    components,
    filters,
    forecast,
    game,
    gates,
    gradients,
    importance,
    numbers,
    occlusion,
    parses,
    reconstructions,
    scenes,
    steps,
    text,
    trees,
)
from jobs.report.sections.section import EVALUATION, Run, Section

SECTIONS: tuple[Section, ...] = (
    classes.SECTION,
    numbers.SECTION,
    forecast.SECTION,
    steps.SECTION,
    text.SECTION,
    trees.SECTION,
    parses.SECTION,
    scenes.SECTION,
    game.SECTION,
    reconstructions.SECTION,
    codes.SECTION,
    occlusion.SECTION,
    importance.SECTION,
    components.SECTION,
    filters.SECTION,
    gradients.SECTION,
    gates.SECTION,
)


def chosen(run: Run) -> list[Section]:
    """Those that show this run: that of its kind; else those that its test names, of the objective and of the model."""
    found = [section for section in SECTIONS if section.left_by(run)]
    if found:
        return found
    with left_out(run.notes, "The predictions", file=EVALUATION):
        run.evaluation = Tensors(run.folder, EVALUATION)
    if run.evaluation is None:
        return [filters.SECTION]
    names: list[str] = []
    with left_out(run.notes, "The predictions", file=EVALUATION):
        names = _named(run.evaluation)
    for name in names:
        with left_out(run.notes, "The predictions", file=EVALUATION):
            found.append(_section(name))
    return found


def _named(evaluation: Tensors) -> list[str]:
    """The sections that the file names; earlier versions named that of the objective at most."""
    about = evaluation.metadata
    if "inside" in about:
        inside = json.loads(about["inside"])
        return [*([about["section"]] if "section" in about else []), *(inside if isinstance(inside, list) else [])]
    name = about.get("section") or ("numbers" if _holds_numbers(evaluation) else "classes")
    # rows that differ in length, texts and trees, are no pictures
    return [name] if "example_inputs.lengths" in evaluation else [name, filters.SECTION.name]


def _section(name: str) -> Section:
    by_name = {section.name: section for section in SECTIONS}
    if name not in by_name:
        raise AbsentError(f"the report has no section {name}")
    return by_name[name]


def _holds_numbers(evaluation: Tensors) -> bool:
    """Whether rows of floating-point numbers were predicted: one of them, or several."""
    entry = evaluation.header.get("example_predictions")
    return entry is not None and "F" in entry["dtype"] and len(entry["shape"]) <= 2
