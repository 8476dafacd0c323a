"""Scenes: which joins of segments are right: F1 of brackets beside joins that nobody has learned, and join by join."""

from typing import Any

from jobs.report.charts import number
from jobs.report.files import AbsentError, left_out
from jobs.report.sections.brackets import FIGURES, f1_of, percent, summed
from jobs.report.sections.section import EVALUATION, Run, Section

ORDERS = (("", "the parser"), ("nearest_", "the most alike first"), ("random_", "in a random order"))
JOINS = ((1, 2), (3, 5), (6, 10), (11, 20), (21, None))  # from and to


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    split = tensors.metadata.get("split", "test")
    page: dict[str, Any] = {"split": split, "orders": f1_of(run, split, ORDERS), "steps": []}
    with left_out(run.notes, "Joins in their order", file=tensors.name):
        if "steps" not in tensors:
            raise AbsentError("the run kept none")
        for name, (right, every) in summed(tensors["steps"], JOINS, "later", begin=1):
            if every:
                page["steps"].append((name, percent(right / every), number(every)))
    return page


SECTION = Section(
    name="scenes", template="scenes.html", read=_read, title="The scenes", file=EVALUATION, figures=FIGURES
)
