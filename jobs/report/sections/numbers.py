"""Numbers: what was predicted against what is true, a chart for each output."""

from typing import Any

from jobs.report.charts import scatter_chart
from jobs.report.files import left_out
from jobs.report.sections.section import EVALUATION, Run, Section, predicted

MAX_OUTPUTS = 6


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    with left_out(run.notes, "The examples", file=tensors.name):
        columns = [values.reshape(len(values), -1).T[:MAX_OUTPUTS] for values in predicted(tensors)]
        scatter = [scatter_chart(f"output {place}", *pair) for place, pair in enumerate(zip(*columns, strict=True), 1)]
        return {"split": tensors.metadata.get("split", "test"), "scatter": scatter}
    return {}


SECTION = Section(name="numbers", template="numbers.html", read=_read, title="The predictions", file=EVALUATION)
