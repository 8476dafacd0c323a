"""Scenes: which joins of segments are right: F1 of brackets beside joins that nobody has learned, and join by join."""

from typing import Any

from jobs.report.charts import number
from jobs.report.files import AbsentError, is_number, left_out, mapping
from jobs.report.sections.section import EVALUATION, Run, Section

F1 = "bracket_f1"
ORDERS = (("", "the parser"), ("nearest_", "the most alike first"), ("random_", "in a random order"))
JOINS = ((1, 2), (3, 5), (6, 10), (11, 20), (21, None))  # from and to


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors, metrics = run.evaluation, mapping(run.result.get("metrics"))
    split = tensors.metadata.get("split", "test")
    told = [(name, metrics.get(f"{split}/{order}{F1}")) for order, name in ORDERS]
    page: dict[str, Any] = {
        "split": split,
        "orders": [(name, f"{100 * value:.1f}\u202f%") for name, value in told if is_number(value)],
        "steps": [],
    }
    with left_out(run.notes, "Joins in their order", file=tensors.name):
        if "steps" not in tensors:
            raise AbsentError("the run kept none")
        for first, last in JOINS:
            right, every = tensors["steps"][first - 1 : last].sum(0).tolist()
            name = f"{first} or later" if last is None else f"{first} to {last}"
            if every:
                page["steps"].append((name, f"{100 * right / every:.1f}\u202f%", number(every)))
    return page


SECTION = Section(
    name="scenes", template="scenes.html", read=_read, title="The scenes", file=EVALUATION, figures=(F1, "loss")
)
