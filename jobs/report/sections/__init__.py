"""Sections: THE list of what the page can show of a run beside its curves, one file a kind of evidence."""

from jobs.report.files import AbsentError, Tensors, left_out
from jobs.report.sections import classes, filters, forecast, game, numbers
from jobs.report.sections.section import EVALUATION, Run, Section

SECTIONS: tuple[Section, ...] = (
    classes.SECTION,
    numbers.SECTION,
    forecast.SECTION,
    game.SECTION,
)


def chosen(run: Run) -> list[Section]:
    """Those that show this run: that of its kind; else the one of the evidence that its test left, and the filters."""
    found = [section for section in SECTIONS if section.left_by(run)]
    if found:
        return found
    with left_out(run.notes, "The predictions", file=EVALUATION):
        run.evaluation = Tensors(run.folder, EVALUATION)
        found = [_of_evidence(run.evaluation)]
    # rows that differ in length, texts and trees, are no pictures
    ragged = run.evaluation is not None and "example_inputs.lengths" in run.evaluation
    return found if ragged else [*found, filters.SECTION]


def _of_evidence(evaluation: Tensors) -> Section:
    """The section that the file names; those that earlier versions wrote name none."""
    name = evaluation.metadata.get("section") or ("numbers" if _holds_numbers(evaluation) else "classes")
    by_name = {section.name: section for section in SECTIONS}
    if name not in by_name:
        raise AbsentError(f"the report has no section {name}")
    return by_name[name]


def _holds_numbers(evaluation: Tensors) -> bool:
    """Whether rows of floating-point numbers were predicted: one of them, or several."""
    entry = evaluation.header.get("example_predictions")
    return entry is not None and "F" in entry["dtype"] and len(entry["shape"]) <= 2
