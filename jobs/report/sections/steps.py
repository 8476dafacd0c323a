"""Steps: labels of the steps of rows: the confusion matrix, and rows with the label of each step, right or wrong."""

from typing import Any, NamedTuple

from jobs.report.confusion import class_namer, confusion_page
from jobs.report.files import AbsentError, left_out
from jobs.report.sections.section import EVALUATION, Run, Section
from jobs.report.texts import Words, example_rows

MAX_ROWS = 6  # with wrong steps, and half as many without
MAX_STEPS, BEFORE = 100, 20  # of a row; of longer ones from so many before the first wrong step on


class Step(NamedTuple):
    """One step of a row: its word, or its number where it has none, and its labels."""

    word: str
    true: str
    predicted: str
    wrong: bool


class Row(NamedTuple):
    """Some steps of a row from the `first` on, and how many of all are wrong."""

    steps: list[Step]
    first: int
    num_wrong: int
    num_steps: int


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    class_name = class_namer(tensors)
    page: dict[str, Any] = {
        "split": tensors.metadata.get("split", "test"),
        "num_classes": None,
        "rows": [],
        "right": [],
    }
    if "confusion" in tensors:
        with left_out(run.notes, "The confusion matrix", file=tensors.name):
            page |= confusion_page(tensors["confusion"], class_name, counted="steps")
    with left_out(run.notes, "The examples", file=tensors.name):
        targets, predictions = example_rows(tensors, "targets"), example_rows(tensors, "predictions")
        if not targets:
            raise AbsentError("the run kept none")
        words, inputs = Words.of(tensors), example_rows(tensors, "inputs")
        rows = []
        for place, (true, predicted) in enumerate(zip(targets, predictions, strict=True)):
            read = [words.cell(number) for number in inputs[place]] if inputs else map(str, range(1, len(true) + 1))
            labels = list(zip(read, true, predicted, strict=True))
            wrong = [number for number, (_, a, b) in enumerate(labels) if a != b]
            first = max(0, min(wrong[0] - BEFORE if wrong else 0, len(labels) - MAX_STEPS))
            some = labels[first : first + MAX_STEPS]
            steps = [Step(word, class_name(a), class_name(b), a != b) for word, a, b in some]
            rows.append(Row(steps, first, len(wrong), len(labels)))
        page["rows"] = [row for row in rows if row.num_wrong][:MAX_ROWS]
        page["right"] = [row for row in rows if not row.num_wrong][: MAX_ROWS // 2]
    return page


SECTION = Section(name="steps", template="steps.html", read=_read, title="The predictions", file=EVALUATION)
