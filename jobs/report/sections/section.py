"""Section: a part of the page about one kind of evidence: what it reads of a run, and the template that shows it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from cluster.storage import Folder
from jobs.report.charts import Mark
from jobs.report.files import AbsentError, Tensors

EVALUATION = "evaluation.safetensors"
MODEL = "model/model.safetensors"


@dataclass
class Run:
    """A run as sections find it: what the page has read of it already, empty where it is absent or broken."""

    folder: Folder
    recipe: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()  # the lines of metrics.jsonl
    evaluation: Tensors | None = None  # evaluation.safetensors
    notes: list[str] = field(default_factory=list)  # what is not on the page, and why: see left_out


def _never(run: Run) -> bool:
    return False


def _no_marks(run: Run) -> list[Mark]:
    return []


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page. What a run lacks, or holds broken, is left out and noted: it never fails the report."""

    name: str  # as the evidence calls it (`section` in nn_models/evidence.py)
    template: str  # beside this file
    read: Callable[[Run], dict[str, Any]]  # what the template is given; where that is nothing, it is not shown
    title: str  # as the page calls it where `read` raises what `left_out` takes ...
    file: str  # ... of this file of the run
    left_by: Callable[[Run], bool] = _never  # whether a run is of its kind though no evaluation.safetensors says so
    above: bool = False  # whether it stands above the curves
    figures: tuple[str, ...] = ()  # the metrics that head the page, in this order; by default all, the loss last
    marks: Callable[[Run], list[Mark]] = _no_marks  # steps to point out in all charts


def predicted(tensors: Tensors) -> tuple[NDArray[Any], NDArray[Any]]:
    """The examples' targets and predictions, both (rows, ...). Raises AbsentError where there are none that fit."""
    if "example_predictions" not in tensors:
        raise AbsentError("the run kept none")
    targets, predictions = tensors["example_targets"], tensors["example_predictions"]
    if targets.shape != predictions.shape or not predictions.size:
        raise AbsentError(f"targets of shape {targets.shape} and predictions of shape {predictions.shape}")
    return targets, predictions
