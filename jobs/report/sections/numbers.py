"""Numbers: what was predicted against what is true, how far off it is, and what needs no training beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.report.charts import number, residual_chart, scatter_chart
from jobs.report.files import is_number, left_out, mapping
from jobs.report.sections.section import EVALUATION, Run, Section, predicted

MAX_OUTPUTS = 6
COMPARED = {"the model": "", "linear regression": "linear_", "always the mean": "mean_"}
ERRORS = ("mse", "mae")


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    with left_out(run.notes, "The examples", file=tensors.name):
        whole = "predictions" in tensors  # earlier versions kept the examples only
        found = (tensors["targets"], tensors["predictions"]) if whole else predicted(tensors)
        columns = [values.reshape(len(values), -1).T[:MAX_OUTPUTS] for values in found]
        pairs = list(enumerate(zip(*columns, strict=True), 1))
        return {
            "split": tensors.metadata.get("split", "test"),
            "rows": len(found[0]),
            "scatter": [scatter_chart(f"output {place}", *pair) for place, pair in pairs],
            "residuals": [residual_chart(f"residuals of output {place}", *pair) for place, pair in pairs],
            "compared": compared(mapping(run.result.get("metrics")), COMPARED, ERRORS),
        }
    return {}


def compared(
    metrics: Mapping[str, Any], who: Mapping[str, str], errors: Sequence[str]
) -> list[tuple[str, list[str | None]]]:
    """Who predicts, and its errors on the test split; nothing where there is nobody beside the model.

    `who` has the prefix of each one's metrics.
    """
    rows = []
    for name, prefix in who.items():
        found = [metrics.get(f"test/{prefix}{error}") for error in errors]
        if all(map(is_number, found)):
            rows.append((name, [number(value) for value in found]))
    return rows if len(rows) > 1 else []


SECTION = Section(
    name="numbers",
    template="numbers.html",
    read=_read,
    title="The predictions",
    file=EVALUATION,
    figures=("mse", "mae", "r2", "mean_mse", "linear_mse", "loss"),
)
