"""Trees: classes of nodes: the confusion matrix, accuracy by height, and pictures of trees, node by node."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.report.charts import Chart, number
from jobs.report.confusion import class_namer, confusion_page
from jobs.report.files import AbsentError, Tensors, left_out, mapping
from jobs.report.lines import Line, line_chart
from jobs.report.sections.section import EVALUATION, Run, Section
from jobs.report.texts import Words
from jobs.report.trees import MOST_WORDS, Mark, Picture, can_be_read, picture

Array = NDArray[Any]

MOST_TREES = 4  # of each sort
SHORT = 3  # characters of a class's name that fit into a node
FEWEST = 20  # nodes of a height whose accuracy says something


class Unknown(NamedTuple):
    """Words that are not in the vocabulary, for people."""

    unknown: str
    every: str
    share: str
    known: str | None


class Tree(NamedTuple):
    """An example as stored: nodes' words and children, and by name what is kept of each node."""

    words: list[str | None]
    children: Array
    nodes: dict[str, Array]


def trees_of(tensors: Tensors, prefix: str, names: tuple[str, ...] = ()) -> Iterator[Tree]:
    """The examples whose tensors begin with `prefix`: with these columns of their nodes."""
    if f"{prefix}_inputs.lengths" not in tensors:
        return
    words = Words.of(tensors)
    ends = np.cumsum(tensors[f"{prefix}_inputs.lengths"])
    columns = {name: tensors[f"{prefix}_{name}.values"] for name in names}
    numbers, children = tensors[f"{prefix}_inputs.words"], tensors[f"{prefix}_inputs.children"]
    for first, end in zip((0, *ends[:-1]), ends, strict=True):
        told = [None if word < 0 else words.name(int(word)) for word in numbers[first:end]]
        yield Tree(told, children[first:end], {name: values[first:end] for name, values in columns.items()})


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    class_name = class_namer(tensors)
    page: dict[str, Any] = {
        "split": tensors.metadata.get("split", "test"),
        "num_classes": None,
        "by_height": None,
        "words": None,
        "flips": [],
        "wrong": [],
        "right": [],
        "most_words": MOST_WORDS,
        "legend": "",
    }
    with left_out(run.notes, "The confusion matrix", file=tensors.name):
        if "confusion" not in tensors:
            raise AbsentError("the run kept none")
        page |= confusion_page(tensors["confusion"], class_name, counted="nodes")
    with left_out(run.notes, "The accuracy by height", file=tensors.name):
        page["by_height"] = _by_height(tensors)
    with left_out(run.notes, "The unknown words", file=tensors.name):
        page["words"] = unknown_words(tensors)
    with left_out(run.notes, "The trees", file=tensors.name):
        mark = _marker(class_name, page["num_classes"] or 0)
        page["legend"] = mark.legend
        for prefix in ("flipped", "example"):
            for tree in trees_of(tensors, prefix, ("targets", "predictions", "confidences")):
                if not can_be_read(tree.words):
                    continue
                is_right = tree.nodes["targets"][-1] == tree.nodes["predictions"][-1]
                sort = "flips" if prefix == "flipped" else "right" if is_right else "wrong"
                if len(page[sort]) < MOST_TREES:
                    page[sort].append(_picture(tree, mark))
    return page


class _Marker(NamedTuple):
    """How classes are called in a node and on a closer look, and what explains the short names."""

    short: Callable[[int], str]
    name: Callable[[int], str]
    legend: str


def _marker(class_name: Callable[[int], str], num_classes: int) -> _Marker:
    names = [class_name(number) for number in range(num_classes)]
    if all(len(name) <= SHORT for name in names):
        return _Marker(class_name, class_name, "")
    told = [f"{place} {name}" for place, name in enumerate(names) if name != str(place)]
    return _Marker(str, class_name, ", ".join(told[:20]) + ", \u2026" * (len(told) > 20))


def _picture(tree: Tree, mark: _Marker) -> Picture:
    targets, predictions, sure = (tree.nodes[name] for name in ("targets", "predictions", "confidences"))
    marks = []
    for node, below in enumerate(tree.children):
        true, predicted = int(targets[node]), int(predictions[node])
        wrong = true != predicted
        under = [int(predictions[child]) for child in below if child >= 0]
        all_right = not wrong and all(targets[child] == predictions[child] for child in below if child >= 0)
        title = f"predicted {mark.name(predicted)}, {100 * sure[node]:.0f} %" + f"; true {mark.name(true)}" * wrong
        text = f"{mark.short(predicted)} ({mark.short(true)})" if wrong else mark.short(predicted)
        flips = bool(under) and predicted not in under and all_right
        marks.append(Mark(text, f"{100 * sure[node]:.0f}", title, wrong, float(sure[node]), flips))
    return picture(tree.words, tree.children.tolist(), marks)


def _by_height(tensors: Tensors) -> Chart:
    if "heights" not in tensors:
        raise AbsentError("the run kept none")
    right, every = tensors["heights"].T
    enough = every >= min(FEWEST, every.max())
    shares = np.where(enough, right / np.maximum(every, 1), np.nan)[: 1 + int(np.flatnonzero(enough).max())]
    return line_chart("accuracy by height", [Line("nodes", "test", shares)], x_label="height", unit=True)


def unknown_words(tensors: Tensors) -> Unknown | None:
    """Of the test; None where nobody counted."""
    if "words" not in tensors:
        return None
    unknown, every = tensors["words"].tolist()
    column = mapping(mapping(json.loads(tensors.metadata.get("signature", "{}"))).get("columns")).get("input")
    known = mapping(column).get("known")
    share = f"{100 * unknown / max(every, 1):.2g}\u202f%"
    return Unknown(f"{unknown:,}", f"{every:,}", share, number(known) if known else None)


SECTION = Section(
    name="trees",
    template="trees.html",
    read=_read,
    title="The trees",
    file=EVALUATION,
)
