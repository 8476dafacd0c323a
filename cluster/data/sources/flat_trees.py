"""Flat trees: trees as lists of nodes, read from brackets, nested lists or heads without recursion, however deep."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from cluster.data.sources.base import BadRows

BRACKETS = re.compile(r"[()]|[^() ]+")  # only the space separates: tokens of the SST have U+00A0 inside
LISTS = re.compile(r'[\[\],]|"(?:[^"\\]|\\.)*"|[^\[\],"\s]+')
MEND = "mend the line, or take it out"


class FlatTree(NamedTuple):
    """The nodes of a tree, children before parents, so the root last: their words, children's places and labels."""

    words: list[str | None]
    children: list[tuple[int, ...]]
    labels: list[str | None]

    def levels(self) -> list[int]:
        """Of each node: 0 of leaves, 1 more than the highest of its children's."""
        found: list[int] = []
        for children in self.children:
            found.append(1 + max(found[child] for child in children) if children else 0)
        return found


def left_to_right(tree: FlatTree) -> FlatTree:
    """The same tree, a node's children and all below them in their order before it."""
    order: list[int] = []  # from the right, parents first
    open_ = [len(tree.words) - 1]
    while open_:
        node = open_.pop()
        order.append(node)
        open_ += tree.children[node]
    order.reverse()
    place = {node: index for index, node in enumerate(order)}
    return FlatTree(
        [tree.words[node] for node in order],
        [tuple(place[child] for child in tree.children[node]) for node in order],
        [tree.labels[node] for node in order],
    )


class Token(NamedTuple):
    """A bracket, `(` or `)`, or a text (`is_text`), and the column where it stands, counted from 1."""

    text: str
    is_text: bool
    column: int


def bad(where: str, message: str, fix: str = MEND) -> BadRows:
    """What is wrong at a place of a file."""
    return BadRows(where, message, fix)


def of_brackets(
    text: str, *, labelled: bool, where: str, shift: int = 0, known: Sequence[str] = (), binary: bool = False
) -> FlatTree:
    """The tree of `(3 (2 It) (4 works))` where nodes are labelled, else of `(It works)`. Raises BadRows.

    `where` names the line in errors, and `shift` is what is to be added to columns there. Labels must be among the
    `known` ones, where there are some, and nodes of a `binary` tree have two children or none.
    """
    found = BRACKETS.finditer(text)
    tokens = (Token(match[0], match[0] not in "()", match.start() + 1 + shift) for match in found)
    return _tree(tokens, labelled=labelled, where=where, length=len(text) + shift, known=known, binary=binary)


def of_lists(text: str, *, labelled: bool, where: str, shift: int = 0) -> FlatTree:
    """The tree of JSON's `[3, [2, "It"], [4, "works"]]` where nodes are labelled, else of `["It", "works"]`."""
    return _tree(_list_tokens(text, where, shift), labelled=labelled, where=where, length=len(text) + shift)


def _list_tokens(text: str, where: str, shift: int) -> Iterator[Token]:
    for match in LISTS.finditer(text):
        found, column = match[0], match.start() + 1 + shift
        if found in "[]":
            yield Token("(" if found == "[" else ")", False, column)
        elif found != ",":
            try:
                value = json.loads(found)
            except ValueError:
                raise bad(f"{where}, column {column}", f"{found!r} is neither a text nor a number") from None
            yield Token(value if isinstance(value, str) else str(value), True, column)


class _Open:
    """A node whose bracket is not closed yet."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.label: str | None = None
        self.word: str | None = None
        self.children: list[int] = []


def _tree(
    tokens: Iterable[Token],
    *,
    labelled: bool,
    where: str,
    length: int,
    known: Sequence[str] = (),
    binary: bool = False,
) -> FlatTree:
    tree = FlatTree([], [], [])
    above: list[_Open] = []
    roots: list[int] = []

    def add(word: str | None, children: Sequence[int], label: str | None) -> None:
        tree.words.append(word)
        tree.children.append(tuple(children))
        tree.labels.append(label)
        (above[-1].children if above else roots).append(len(tree.words) - 1)

    for token in tokens:
        here = f"{where}, column {token.column}"
        if roots:
            raise bad(here, f"{token.text!r} after the end of the tree")
        if token.is_text:
            if not labelled:
                add(token.text, (), None)
            elif not above:
                raise bad(here, f"{token.text!r} outside of any bracket")
            elif above[-1].label is None:
                if known and token.text not in known:
                    raise bad(here, f"the label {token.text!r} is none of {known[0]} to {known[-1]}")
                above[-1].label = token.text
            elif above[-1].word is not None or above[-1].children:
                raise bad(here, f"{token.text!r} is a second word or child of a leaf, whose bracket has one word")
            else:
                above[-1].word = token.text
        elif token.text == "(":
            if labelled and above and (above[-1].label is None or above[-1].word is not None):
                what = "the node above has no label" if above[-1].label is None else f"{above[-1].word!r} stands alone"
                raise bad(here, f"a bracket where {what}")
            above.append(_Open(token.column))
        else:
            if not above:
                raise bad(here, "a bracket is closed that was not opened")
            node = above.pop()
            if labelled and node.label is None:
                raise bad(f"{where}, column {node.column}", "an empty node")
            if node.word is None and not node.children:
                raise bad(f"{where}, column {node.column}", "a node without a word or children")
            if binary and len(node.children) not in (0, 2):
                what = f"{len(node.children)} child{'ren' * (len(node.children) > 1)}"
                raise bad(f"{where}, column {node.column}", f"a node of {what}, where trees are binary")
            if not labelled and len(node.children) == 1:  # brackets around one node say nothing
                (above[-1].children if above else roots).append(node.children[0])
            else:
                add(node.word, node.children, node.label)
    if above:
        raise bad(f"{where}, column {above[-1].column}", "a bracket is opened and not closed")
    if not roots:
        raise bad(f"{where}, column {length + 1}", "an empty tree")
    return tree


def of_heads(words: Sequence[str], heads: Sequence[int], labels: Sequence[str | None], *, where: str) -> FlatTree:
    """The dependency tree of words whose heads are counted from 1, 0 for the root's. Raises BadRows."""
    num = len(words)
    if not num:
        raise bad(where, "an empty tree")
    if len(heads) != num or len(labels) != num:
        raise bad(where, f"{len(heads)} heads and {len(labels)} labels of {num} words")
    below: list[list[int]] = [[] for _ in range(num + 1)]
    for word, head in enumerate(heads, start=1):
        if not 0 <= head <= num:
            raise bad(where, f"word {word} ({words[word - 1]!r}) has the head {head}, where there are {num} words")
        below[head].append(word)
    if len(below[0]) != 1:
        roots = ", ".join(map(str, below[0])) or "none"
        raise bad(where, f"words with the head 0: {roots}", "give one word the head 0, the root")
    order: list[int] = []  # parents before children
    open_ = [*below[0]]
    while open_:
        word = open_.pop()
        order.append(word)
        open_ += below[word]
    if len(order) < num:
        lost = min(set(range(1, num + 1)) - set(order))
        circle = [lost]
        while (head := heads[circle[-1] - 1]) not in circle:
            circle.append(head)
        chain = " -> ".join(map(str, [*circle[circle.index(head) :], head]))
        raise bad(where, f"heads go in a circle: {chain}", "let each word's heads lead to the root")
    order.reverse()
    place = {word: index for index, word in enumerate(order)}
    return FlatTree(
        [words[word - 1] for word in order],
        [tuple(place[child] for child in below[word]) for word in order],
        [labels[word - 1] for word in order],
    )


def of_joins(words: Sequence[str], brackets: Iterable[tuple[int, int]]) -> FlatTree:
    """The tree over words whose neighbours are joined into these brackets, (first, past-the-last) word each."""
    tree = FlatTree([*words], [() for _ in words], [None for _ in words])
    starting = {place: (place, place + 1) for place in range(len(words))}  # first word -> node, and where it ends
    for first, end in brackets:
        left, middle = starting[first]
        right, behind = starting.pop(middle)
        assert behind == end
        starting[first] = (len(tree.words), end)
        tree.words.append(None)
        tree.children.append((left, right))
        tree.labels.append(None)
    return tree


def spelled(
    words: Sequence[str | None], children: Sequence[Sequence[int]], labels: Sequence[object] | None = None
) -> str:
    """The tree in brackets, as `of_brackets` reads it: with the labels of all nodes, or with none.

    Children that are less than 0 are not there. Raises ValueError where a node has both a word and children.
    """
    parts: list[str] = []
    open_: list[int | str] = [len(words) - 1]
    while open_:
        node = open_.pop()
        if isinstance(node, str):
            parts.append(node)
            continue
        below = [child for child in children[node] if child >= 0]
        word = words[node]
        if (word is None) != bool(below):
            raise ValueError("brackets have words at the leaves only")
        label = None if labels is None else f"({labels[node]}"
        if not below:
            assert word is not None
            parts.append(word if label is None else f"{label} {word})")
            continue
        parts.append("(" if label is None else f"{label} ")
        open_.append(")")
        between: list[int | str] = []
        for child in below:
            between += [child, " "]
        open_ += reversed(between[:-1])
    return "".join(parts)
