"""Treebank: a source's trees as columns, their vocabulary, and the Stanford Sentiment Treebank (Socher et al. 2013)."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from cluster.data.layouts import Array, Dense, Layout, Ragged
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.sources.base import (
    BadRows,
    DataSpec,
    FittedSpec,
    Part,
    Source,
    SplitSpec,
    absolute,
    bad_rows,
    labels,
    parts_of,
)
from cluster.data.sources.flat_trees import FlatTree, of_brackets
from cluster.data.split import Traits
from cluster.storage import Folder
from nn_models.columns import Labels, Tree
from nn_models.errors import Problem, UserError

PART_ROWS = 4096


@dataclass(frozen=True)
class Treebank:
    """The trees of each pool as columns, laid out already."""

    columns: Mapping[str, StoredColumn]
    rows: Mapping[str, Mapping[str, Layout]]  # of each pool
    classes: Mapping[str, Array]  # of each pool's trees

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return {pool: parts_of(pool, len(found), PART_ROWS) for pool, found in self.classes.items()}

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        pool, first, end = part.what
        return {name: layout.take(slice(first, end)) for name, layout in self.rows[pool].items()}

    def traits(self, part: Part) -> Traits:
        """See Source: the classes of whole trees."""
        pool, first, end = part.what
        return Traits(self.classes[pool][first:end])


class TreebankSpec(FittedSpec):
    """Base of the data sections of trees in files."""

    min_count: Annotated[int, Field(ge=1)] = Field(
        1, description="words that the training trees have less often share the vector of unknown words"
    )

    def fits(self, manifest: Manifest) -> bool:
        """See FittedSpec."""
        tree = manifest.signature.columns.get("input")
        return isinstance(tree, Tree) and bool(tree.vocabulary)

    def treebank(
        self,
        pools: Mapping[str, Sequence[FlatTree]],
        classes: Mapping[str, Sequence[int]],
        *,
        each_node: bool,
        names: tuple[str, ...],
        words_at: Literal["leaves", "nodes"] = "leaves",
    ) -> Treebank:
        """The trees of each pool; `classes` are the numbers of their labels, of all nodes in their order, or of trees.

        `names` are those of the classes. The vocabulary is that of the pool "train", the most frequent words first, or
        the one of the model that this is other data for. Other words follow, so that every tree can be spelled again,
        but nets do not tell them from each other.
        """
        if vocabulary := self.known("input"):
            known = len(vocabulary)
        else:
            counts = Counter(word for tree in pools["train"] for word in tree.words if word is not None)
            vocabulary = tuple(sorted(counts, key=lambda word: (-counts[word], word)))
            known = max(1, sum(count >= self.min_count for count in counts.values()))
        others = {word for trees in pools.values() for tree in trees for word in tree.words if word is not None}
        words = (*vocabulary, *sorted(others.difference(vocabulary)))
        arity = max(2, *(len(below) for trees in pools.values() for tree in trees for below in tree.children))
        numbers = {word: number for number, word in enumerate(words)}
        tree = Tree(names=words, size=len(words), arity=arity, known=known, words_at=words_at)
        labelled = Labels(names=names, size=len(names))
        columns = {
            "input": StoredColumn(column=tree),
            "target": StoredColumn(column=labelled, dtype="int32") if each_node else labels(names),
        }
        rows, roots = {}, {}
        for pool, trees in pools.items():
            stored = laid(trees, numbers, arity)
            found = np.array(classes[pool])
            roots[pool] = (found[stored.offsets[1:] - 1] if each_node else found).astype(np.int64)
            target: Layout = Dense(roots[pool])
            if each_node:
                target = Ragged({"values": found.astype(np.int32)}, stored.offsets)
            rows[pool] = {"input": stored, "target": target}
        return Treebank(columns, rows, roots)


def laid(trees: Sequence[FlatTree], numbers: Mapping[str, int], arity: int) -> Ragged:
    """The trees' nodes one after the other, with the words' numbers and room for so many children."""
    words = [-1 if word is None else numbers[word] for tree in trees for word in tree.words]
    children = np.full((len(words), arity), -1, np.int32)
    flat = [below for tree in trees for below in tree.children]
    sizes = np.fromiter(map(len, flat), np.int64, len(flat))
    inside = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    children[np.repeat(np.arange(len(flat)), sizes), inside] = [child for below in flat for child in below]
    level = [height for tree in trees for height in tree.levels()]
    fields = {"words": np.array(words, np.int32), "children": children, "level": np.array(level, np.int32)}
    return Ragged.of(fields, [len(tree.words) for tree in trees])


def read_lines(folder: Folder, name: str) -> list[str]:
    """The lines of a text file; other characters than its ends do not separate lines. Raises UserError."""
    where = f"{folder}/{name}"
    try:
        text = folder.read_bytes(name).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(where, "no such file", "check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(where, f"no UTF-8 text (byte {error.start})", "convert it") from None
    except OSError as error:
        raise UserError(where, f"cannot be read ({error})", "check the file") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


SST_FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
SST_CLASSES: tuple[str, ...] = ("very negative", "negative", "neutral", "positive", "very positive")


class SSTSpec(TreebankSpec, SplitSpec):
    """Stanford Sentiment Treebank: sentences as binary trees, each phrase from 0, very negative, to 4, very positive.

    A folder with train.txt, dev.txt and test.txt, a tree a line: `(3 (2 It) (4 (2 's) (4 great)))`.
    """

    kind: Literal["sst"] = "sst"
    path: str = Field(min_length=1, description="the folder, local or a URI")
    grades: Literal[5, 3] = Field(
        5, description="3: negative, neutral and positive phrases, without the sentences that are neutral as a whole"
    )

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={"path": absolute(self.path, base)})

    def fingerprint(self) -> str:
        """See DataSpec."""
        folder = Folder(self.path)
        found = []
        for name in SST_FILES.values():
            if not folder.exists(name):
                fix = "set data.path to the folder with train.txt, dev.txt and test.txt (nlp.stanford.edu/sentiment)"
                raise UserError("data.path", f"{folder} has no {name}", fix)
            info = folder.info(name)
            found.append((name, info.size, info.mtime_ns))
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def open(self) -> Source:
        """See DataSpec."""
        self.fingerprint()  # refuses a folder without these files
        folder = Folder(self.path)
        pools: dict[str, list[FlatTree]] = {pool: [] for pool in SST_FILES}
        problems: list[Problem] = []
        for pool, name in SST_FILES.items():
            lines = [(number, line) for number, line in enumerate(read_lines(folder, name), start=1) if line.strip(" ")]
            if not lines:
                raise UserError(f"{folder}/{name}", "no trees in there", "give a file that has some")
            for number, line in lines:
                where = f"{folder}/{name}, line {number}"
                try:
                    pools[pool].append(of_brackets(line, labelled=True, where=where, known="01234", binary=True))
                except BadRows as error:
                    problems += error.problems
        if problems:
            raise bad_rows(problems)
        names, grade = SST_CLASSES, {str(number): number for number in range(5)}
        if self.grades == 3:
            names, grade = names[1:4], {"0": 0, "1": 0, "2": 1, "3": 2, "4": 2}
            pools = {pool: [tree for tree in trees if tree.labels[-1] != "2"] for pool, trees in pools.items()}
        classes = {
            pool: [grade[str(label)] for tree in trees for label in tree.labels] for pool, trees in pools.items()
        }
        return self.treebank(pools, classes, each_node=True, names=names)
