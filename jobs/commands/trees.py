"""What `manta predict` prints of a tree: a line for each node, with its class and how sure the model is of it."""

from collections.abc import Iterator
from typing import Any

from cluster.data.sources.flat_trees import spelled
from cluster.inference.predict import PredictedTree


def tree_lines(found: PredictedTree) -> Iterator[str]:
    """The root first, each node's children under it, from left to right; however deep."""
    tree = found.tree
    open_ = [(len(tree.words) - 1, "", "")]  # a node, what stands before it, and before what is under it
    while open_:
        node, before, under = open_.pop()
        label, sure, word = found.labels[node], found.confidences[node], tree.words[node]
        parts = [] if label is None else [label, "" if sure is None else f"{100 * sure:.0f} %"]
        parts += [] if word is None else [word]
        yield before + ("  ".join(filter(None, parts)) or "\u2022")
        below = tree.children[node]
        for child in reversed(below):
            last = child == below[-1]
            arm, rest = ("\u2514\u2500 ", "   ") if last else ("\u251c\u2500 ", "\u2502  ")
            open_.append((child, under + arm, under + rest))


def tree_json(found: PredictedTree) -> dict[str, Any]:
    """The same for programs: nodes as lists, children before parents, the root last."""
    tree = found.tree
    return {
        "tree": spelled(tree.words, tree.children),
        "words": tree.words,
        "children": tree.children,
        "labels": found.labels,
        "confidences": found.confidences,
    }
