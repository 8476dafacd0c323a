"""ListOps: nested operations on lists of digits, generated (Nangia & Bowman 2018)."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from cluster.data.layouts import Dense, Layout, Ragged
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import DrawnTestSpec, Part, Source, even_parts, labels
from cluster.data.sources.flat_trees import FlatTree, left_to_right
from cluster.data.sources.treebank import laid
from cluster.data.split import Traits
from nn_models.columns import Labels, Tokens, Tree
from nn_models.errors import UserError
from nn_models.spec import invalid

DIGITS = tuple("0123456789")
END, NO_VALUE = "]", "none"  # the name of the class of operations and brackets, where nodes are labelled
# Each operation's name, and what it makes of digits; the median of evenly many is rounded down, SM the sum modulo 10.
OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
WORDS = (*DIGITS, *OPERATIONS, END)
NESTING = 0.25  # how often an argument is an operation again
PART_ROWS = 8192
MOST_TRIES = 50  # draws for each row that is wanted

# An expression in Polish notation: digits, and operations with their number of arguments.
Expression = tuple[tuple[str, int], ...]


class ListOpsSpec(DrawnTestSpec):
    """Nested lists of digits under maximum, minimum, median and sum modulo 10, such as [MAX 2 9 [MIN 4 7 ] 0 ].

    `binary` trees join an operation with one argument after the other, and with a last bracket; in `nary` ones it
    stands above its arguments; as `tokens` a flat net reads them. No expression comes twice. What is to be predicted
    is the value of the whole, or of each node: of an operation with some of its arguments, what it makes of these.
    """

    kind: Literal["listops"] = "listops"
    form: Literal["binary", "nary", "tokens"] = Field("binary", description="how they are given to a net")
    labels: Literal["root", "nodes"] = Field("root", description="what has a value: the whole, or each node of a tree")
    rows: PositiveInt = Field(20_000, description="expressions that are drawn, for all splits together")
    depth: PositiveInt = Field(6, description="operations inside each other, at most")
    length: Annotated[int, Field(ge=4)] = Field(50, description="tokens, brackets included, at most")
    max_arguments: Annotated[int, Field(ge=2)] = Field(5, description="of an operation")
    seed: NonNegativeInt = Field(0, description="what they are drawn from")

    @model_validator(mode="after")
    def _one_operation_fits(self) -> "ListOpsSpec":
        if self.max_arguments + 2 > self.length:
            raise invalid(f"{self.max_arguments} and two brackets are more than length", field="max_arguments")
        if self.form == "tokens" and self.labels == "nodes":
            raise invalid("tokens have no nodes", "set labels to root, or form to binary or nary", field="labels")
        return self

    def open(self) -> Source:
        """See DataSpec."""
        return _ListOps(self, _drawn(self))


@dataclass(frozen=True)
class _ListOps:
    spec: ListOpsSpec
    expressions: Sequence[Expression]

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        if self.spec.form == "tokens":
            column: Tokens | Tree = Tokens(names=WORDS, size=len(WORDS))
        else:
            nary = self.spec.form == "nary"
            arity = self.spec.max_arguments if nary else 2
            column = Tree(names=WORDS, size=len(WORDS), arity=arity, words_at="nodes" if nary else "leaves")
        names = (*DIGITS, NO_VALUE) if self.spec.form == "binary" else DIGITS
        each_node = StoredColumn(column=Labels(names=names, size=len(names)), dtype="int32")
        return {
            "input": StoredColumn(column=column),
            "target": labels(DIGITS) if self.spec.labels == "root" else each_node,
        }

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return {"train": even_parts(len(self.expressions), PART_ROWS)}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        return Traits(self._values(part))

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        chosen = self.expressions[slice(*part.what)]
        numbers = {word: number for number, word in enumerate(WORDS)}
        target: Layout = Dense(self._values(part))
        if self.spec.form == "tokens":
            rows = [[numbers[token] for token in tokens(expression)] for expression in chosen]
            values = np.array([number for row in rows for number in row], np.int32)
            found: Layout = Ragged.of({"values": values}, [len(row) for row in rows])
        else:
            nary = self.spec.form == "nary"
            trees = [nary_tree(expression) if nary else binary_tree(expression) for expression in chosen]
            stored = laid(trees, numbers, self.spec.max_arguments if nary else 2)
            found = stored
            if self.spec.labels == "nodes":
                of_nodes = [len(DIGITS) if label is None else int(label) for tree in trees for label in tree.labels]
                target = Ragged({"values": np.array(of_nodes, np.int32)}, stored.offsets)
        return {"input": found, "target": target}

    def _values(self, part: Part) -> NDArray[np.int64]:
        return np.array([value(expression) for expression in self.expressions[slice(*part.what)]], np.int64)


def _drawn(spec: ListOpsSpec) -> list[Expression]:
    """Expressions of which no two are the same. Raises UserError where there are hardly so many."""
    generator = np.random.default_rng(spec.seed)
    found: dict[Expression, None] = {}  # in the order in which they were drawn
    for _ in range(MOST_TRIES * spec.rows):
        expression = _draw(generator, spec)
        if expression is not None:
            found[expression] = None
        if len(found) == spec.rows:
            return list(found)
    raise UserError(
        "data.rows",
        f"{spec.rows:,}, but of depth {spec.depth} and length {spec.length} only {len(found):,} were found",
        "lower rows, or raise depth or length",
    )


def _draw(generator: np.random.Generator, spec: ListOpsSpec) -> Expression | None:
    """An expression in the order in which it is written; None where it has become too long."""
    names = tuple(OPERATIONS)
    found: list[tuple[str, int]] = []
    open_ = [1]  # the depths of what is still to be drawn, the next one last
    length = 1  # tokens, with those still to be drawn
    while open_:
        depth = open_.pop()
        nested = depth == 1 or (depth <= spec.depth and generator.random() < NESTING)
        if not nested:
            found.append((DIGITS[generator.integers(len(DIGITS))], 0))
            continue
        arguments = int(generator.integers(2, spec.max_arguments + 1))
        length += arguments + 1
        if length > spec.length:
            return None
        found.append((names[generator.integers(len(names))], arguments))
        open_ += [depth + 1] * arguments
    return tuple(found)


def value(expression: Expression) -> int:
    """The digit that it comes to."""
    values: list[int] = []
    for word, arguments in reversed(expression):
        if not arguments:
            values.append(int(word))
        else:
            own = [values.pop() for _ in range(arguments)]
            values.append(OPERATIONS[word](own))
    return values[0]


def tokens(expression: Expression) -> list[str]:
    """As it is written: [MAX 2 9 [MIN 4 7 ] 0 ]."""
    found: list[str] = []
    missing: list[int] = []  # arguments that each open operation still lacks
    for word, arguments in expression:
        found.append(word)
        if arguments:
            missing.append(arguments)
            continue
        while missing:
            missing[-1] -= 1
            if missing[-1]:
                break
            found.append(END)
            missing.pop()
    return found


def nary_tree(expression: Expression) -> FlatTree:
    """Operations above their arguments; labels are values."""
    tree = FlatTree([], [], [])
    above: list[int] = []
    for word, arguments in reversed(expression):
        own = tuple(above.pop() for _ in range(arguments))
        digits = [int(str(tree.labels[child])) for child in own]
        tree.words.append(word)
        tree.children.append(own)
        tree.labels.append(str(OPERATIONS[word](digits)) if own else word)
        above.append(len(tree.words) - 1)
    return left_to_right(tree)


def binary_tree(expression: Expression) -> FlatTree:
    """(((([MAX 2) 9) …) ]): an operation is joined with each argument, and with the bracket at its end.

    Labels are the values of what has been joined, None of operations and brackets alone.
    """
    tree = FlatTree([], [], [])
    above: list[int] = []

    def add(word: str | None, label: str | None, *children: int) -> int:
        tree.words.append(word)
        tree.children.append(children)
        tree.labels.append(label)
        return len(tree.words) - 1

    for word, arguments in reversed(expression):
        node = add(word, None if arguments else word)
        digits: list[int] = []
        for _ in range(arguments):
            argument = above.pop()
            digits.append(int(str(tree.labels[argument])))
            node = add(None, str(OPERATIONS[word](digits)), node, argument)
        above.append(add(None, tree.labels[node], node, add(END, None)) if arguments else node)
    return left_to_right(tree)
