"""Trees: pictures of trees over words, the root above, each node with a mark of its own."""

from collections.abc import Sequence
from typing import NamedTuple

ROW, GAP, MARGIN = 46.0, 12.0, 26.0  # pixels between levels, between words, around all
CHARACTER, NARROWEST = 6.7, 34.0  # pixels of a word's character, and of a word at least
MOST_WORDS = 28  # of a tree that is drawn: more could not be read


def can_be_read(words: Sequence[str | None]) -> bool:
    """Whether a tree of nodes with these words, None for none, is small enough to be drawn."""
    num_words = sum(word is not None for word in words)
    return max(num_words, len(words) - num_words) <= MOST_WORDS


class Mark(NamedTuple):
    """What stands in a node: a short `text`, what is said below it and on a closer look; whether it is wrong."""

    text: str = ""
    below: str = ""
    title: str = ""
    wrong: bool = False
    strength: float = 1.0  # of its colour, 0 to 1
    flips: bool = False  # another class than any of its children's


class Node(NamedTuple):
    """A node where it is drawn."""

    x: float
    y: float
    mark: Mark


class Word(NamedTuple):
    """A word under its node, or over that where there are others below."""

    x: float
    y: float
    text: str
    inside: bool = False  # of a node with children


class Picture(NamedTuple):
    """A tree as SVG: what `sections/tree.html` draws."""

    width: float
    height: float
    edges: list[tuple[float, float, float, float]]
    nodes: list[Node]
    words: list[Word]
    alt: str


def picture(words: Sequence[str | None], children: Sequence[Sequence[int]], marks: Sequence[Mark]) -> Picture:
    """Nodes with children before parents, the root last; children less than 0 are not there.

    Raises ValueError for what is no tree.
    """
    below = [[child for child in found if child >= 0] for found in children]
    if not below or any(child >= place for place, found in enumerate(below) for child in found):
        raise ValueError("no tree: children do not come before parents")
    order: list[int] = []  # the leaves from left to right
    open_, seen = [len(below) - 1], 0
    while open_:
        node = open_.pop()
        seen += 1
        if seen > len(below):
            raise ValueError("no tree: a node is the child of several")
        open_ += reversed(below[node])
        if not below[node]:
            order.append(node)
    height = [0] * len(below)
    for node, found in enumerate(below):
        height[node] = 1 + max(height[child] for child in found) if found else 0
    place = [0.0] * len(below)
    right = MARGIN
    for leaf in order:
        width = max(NARROWEST, CHARACTER * len(words[leaf] or ""))
        place[leaf] = right + width / 2
        right += width + GAP
    for node, found in enumerate(below):
        if found:
            place[node] = (place[found[0]] + place[found[-1]]) / 2
    depth = height[-1]
    level = [MARGIN + ROW * (depth - own) for own in height]
    edges = [(place[n], level[n], place[child], level[child]) for n, found in enumerate(below) for child in found]
    text = " ".join(words[leaf] or "" for leaf in order)
    told = [Word(place[leaf], MARGIN + ROW * depth + 38, words[leaf] or "") for leaf in order]
    told += [
        Word(place[node], level[node] - 13, word, inside=True)
        for node, word in enumerate(words)
        if word is not None and below[node]
    ]
    return Picture(
        width=right - GAP + MARGIN,
        height=MARGIN + ROW * depth + 44,
        edges=edges,
        nodes=[Node(place[node], level[node], marks[node]) for node in range(len(below))],
        words=told,
        alt=f"Tree of: {text}",
    )
