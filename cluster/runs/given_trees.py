"""Given trees: one in brackets, or a plain sentence, as models of trees are given them; or refused by name."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.data.layouts import Array
from cluster.data.sources.base import BadRows
from cluster.data.sources.flat_trees import FlatTree, of_brackets, of_joins
from cluster.data.sources.treebank import laid
from cluster.data.vocabulary import told
from nn_models.columns import Tree
from nn_models.errors import UserError

SPACES = re.compile(r"[ \t\r\n]+")

logger = logging.getLogger(__name__)


def is_tree(text: str) -> bool:
    """Whether a text is a tree in brackets, or one word, and no sentence."""
    return "(" in text or ")" in text or len(_between(text)) == 1


def read_tree(text: str, *, path: str) -> FlatTree:
    """The tree of `((It works) .)`, or of `(3 (2 It) (4 works))`, whose numbers are left out. Raises UserError.

    Nodes have numbers where every bracket begins with one, and has a word or several brackets behind it.
    """
    text = " ".join(text.split("\n")).strip(" ")
    try:
        labelled = of_brackets(text, labelled=True, where=path)
        told_numbers = all(label is not None and label.isdigit() for label in labelled.labels)
        if told_numbers and len(labelled.words) > 1 and all(len(below) != 1 for below in labelled.children):
            return FlatTree(labelled.words, labelled.children, [None] * len(labelled.words))
    except BadRows:
        pass
    try:
        return of_brackets(text, labelled=False, where=path)
    except BadRows as error:
        problem = error.problems[0]
        raise UserError(problem.path, problem.message, "write a tree such as ((It works) .)") from None


def read_sentence(text: str | Sequence[str], *, path: str) -> FlatTree:
    """Its words, which spaces and ends of lines separate, joined from left to right: as one that is still to be parsed.

    Of a tree in brackets the words alone are read. Raises UserError.
    """
    if isinstance(text, str):
        words = words_of(read_tree(text, path=path)) if "(" in text or ")" in text else _between(text)
    else:
        words = list(text)
    if not words:
        raise UserError(path, "no words", "give a sentence")
    return of_joins(words, [(0, end) for end in range(2, len(words) + 1)])


def _between(text: str) -> list[str]:
    """What stands between spaces; other kinds of them, such as U+00A0, belong to a word."""
    return [word for word in SPACES.split(text) if word]


def words_of(tree: FlatTree) -> list[str]:
    """From left to right."""
    words: list[str] = []
    open_ = [len(tree.words) - 1]
    while open_:
        node = open_.pop()
        open_ += reversed(tree.children[node])
        if (word := tree.words[node]) is not None:
            words.append(word)
    return words


def tree_rows(name: str, column: Tree, rows: Sequence[Any]) -> Sequence[Any]:
    """The rows, where texts in brackets and FlatTrees have become the column's fields. Raises UserError."""
    trees = {
        place: row if isinstance(row, FlatTree) else read_tree(row, path=name)
        for place, row in enumerate(rows)
        if isinstance(row, str | FlatTree)
    }
    if not trees:
        return rows
    for tree in trees.values():
        _check(name, column, tree)
    if not column.names:
        raise UserError(name, "the model's words have no names", "give trees by the numbers of their words")
    known = {word: number for number, word in enumerate(column.vocabulary)}
    read = [word for tree in trees.values() for word in tree.words if word is not None]
    if unknown := [word for word in read if word not in known]:
        few = told([*dict.fromkeys(unknown)])
        logger.warning("%s: %d words are not in the vocabulary: %s", name, len(unknown), few)
    numbers = {word: known.get(word, column.num_known) for word in read}
    return [_fields(trees[place], numbers, column) if place in trees else row for place, row in enumerate(rows)]


def _fields(tree: FlatTree, numbers: Mapping[str, int], column: Tree) -> Mapping[str, Array]:
    return laid([tree], numbers, column.arity).fields


def _check(name: str, column: Tree, tree: FlatTree) -> None:
    """Raise UserError for a tree that the column cannot hold."""
    most = max(map(len, tree.children))
    if most > column.arity:
        what = f"a node of {most} children, where the model has learned from trees of at most {column.arity}"
        raise UserError(name, what, "put brackets around two at a time" if column.arity == 2 else "use fewer")
    if column.words_at == "nodes" and most:
        what = "the model reads a word at every node, and brackets have them at the leaves"
        raise UserError(name, what, "give trees as mappings of words, children and level, from Python")
