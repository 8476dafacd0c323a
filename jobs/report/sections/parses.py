"""Parses: what a parser finds: F1 of brackets beside trees of one shape, brackets by size, trees beside true ones."""

from typing import Any

import numpy as np

from jobs.report.charts import number
from jobs.report.files import AbsentError, left_out, mapping
from jobs.report.sections.brackets import F1, FIGURES, f1_of, percent, summed
from jobs.report.sections.section import EVALUATION, Run, Section
from jobs.report.sections.trees import Tree, trees_of
from jobs.report.trees import MOST_WORDS, Mark, Picture, can_be_read, picture

MOST_PARSES = 3  # of each sort
SHAPES = (
    ("", "the parser"),
    ("labelled_", "the parser, with labels"),
    ("left_", "trees to the left"),
    ("right_", "trees to the right"),
    ("balanced_", "balanced trees"),
)
SIZES = ((2, 2), (3, 3), (4, 5), (6, 10), (11, 20), (21, None))  # words of a bracket, from and to


def _read(run: Run) -> dict[str, Any]:
    assert run.evaluation is not None  # it was chosen by what that holds
    tensors = run.evaluation
    split = tensors.metadata.get("split", "test")
    page: dict[str, Any] = {
        "split": split,
        "shapes": f1_of(run, split, SHAPES),
        "labelled": f"{split}/labelled_{F1}" in mapping(run.result.get("metrics")),
        "sizes": [],
        "words": "",
        "wrong": [],
        "right": [],
        "most_words": MOST_WORDS,
    }
    with left_out(run.notes, "Brackets by size", file=tensors.name):
        if "sizes" not in tensors:
            raise AbsentError("the run kept none")
        for name, (right, *counts) in summed(tensors["sizes"], SIZES, "more"):
            shares = [percent(right / every) if every else "-" for every in counts]  # of found ones, and of true ones
            page["sizes"].append((name, *shares, number(counts[1])))
    with left_out(run.notes, "The trees", file=tensors.name):
        if "example_predictions.lengths" not in tensors:
            raise AbsentError("the run kept none")
        ends = np.cumsum(tensors["example_predictions.lengths"])
        parses = np.split(tensors["example_predictions.values"], ends[:-1])
        for tree, found in zip(trees_of(tensors, "example"), parses, strict=True):
            if not can_be_read(tree.words):
                continue
            true, parsed, wrong = _pictures(tree, [(int(first), int(end)) for first, end in found])
            sort = page["wrong" if wrong else "right"]
            if len(sort) < MOST_PARSES:
                sort.append((true, parsed) if wrong else true)
    return page


def _pictures(tree: Tree, found: list[tuple[int, int]]) -> tuple[Picture, Picture, int]:
    """The true tree, the one that was found, and how many brackets of that are wrong."""
    below = [[int(child) for child in children if child >= 0] for children in tree.children]
    order, open_ = [], [len(below) - 1]
    while open_:
        node = open_.pop()
        open_ += reversed(below[node])
        order += [node] * (not below[node])
    place = {leaf: number for number, leaf in enumerate(order)}
    spans: list[tuple[int, int]] = []
    for node, children in enumerate(below):
        spans.append((spans[children[0]][0], spans[children[-1]][1]) if children else (place[node], place[node] + 1))
    true = {span for span, children in zip(spans, below, strict=True) if len(children) > 1}
    words = [tree.words[leaf] for leaf in order]
    nodes = {(number, number + 1): number for number in range(len(words))}
    joined: list[list[int]] = [[] for _ in words]
    marks = [Mark() for _ in words]
    for first, end in found:
        middle = next(b for a, b in nodes if a == first and (b, end) in nodes)
        joined.append([nodes.pop((first, middle)), nodes.pop((middle, end))])
        nodes[first, end] = len(joined) - 1
        is_wrong = (first, end) not in true
        marks.append(Mark(wrong=is_wrong, title="not in the true tree" * is_wrong))
    parsed = picture([*words, *[None] * len(found)], joined, marks)
    return picture(tree.words, below, [Mark()] * len(below)), parsed, sum(mark.wrong for mark in marks)


SECTION = Section(
    name="parses",
    template="parses.html",
    read=_read,
    title="The parses",
    file=EVALUATION,
    figures=(f"labelled_{F1}", *FIGURES),
)
