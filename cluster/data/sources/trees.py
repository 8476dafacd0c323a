"""trees: the user's own trees, from Parquet, JSON lines, lines of brackets, or CoNLL-U files."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pyarrow import fs
from pydantic import Field, PositiveInt

from cluster.data.sources.base import BadRows, DrawnTestSpec, FileColumns, OwnFilesSpec, Source, bad_rows
from cluster.data.sources.flat_trees import FlatTree, bad, of_brackets, of_heads, of_lists
from cluster.data.sources.own_rows import (
    LEAVE_OUT,
    Row,
    class_names,
    conllu_rows,
    files_at,
    is_number,
    json_rows,
    label_text,
    line_rows,
    parquet_rows,
    strange,
)
from cluster.data.sources.treebank import TreebankSpec
from cluster.storage import Folder
from nn_models.errors import Problem, UserError, did_you_mean

READERS = {".parquet": parquet_rows, ".jsonl": json_rows, ".json": json_rows, ".conllu": conllu_rows, ".txt": line_rows}


class _Read(NamedTuple):
    """A row's tree, and the label of all of it where nodes have none."""

    tree: FlatTree
    label: str | None
    where: str


class TreesSpec(OwnFilesSpec, TreebankSpec, DrawnTestSpec):
    """Your own trees: Parquet files, JSON lines, text files with a tree a line in brackets, or CoNLL-U files.

    A tree is in brackets, nested lists, or `words` with their `heads` (counted from 1, 0 for the root's). Where each
    node begins with its label there is `(3 (2 It) (4 works))`, or `[3, [2, "It"], [4, "works"]]`; with a `target` there
    is `(It works)`, or `["It", "works"]`.
    """

    kind: Literal["trees"] = "trees"
    tree: str = Field("tree", description="the column of trees in brackets or nested lists")
    words: str = Field("words", description="where there is no such column: that of the words of dependency trees")
    heads: str = Field("heads", description="and that of their heads")
    target: str | None = Field(
        None,
        min_length=1,
        description="the column of each tree's label, or of a list of labels, one a word (in CoNLL-U files a comment, "
        "or upos, xpos or deprel); without, each node begins with its label",
    )
    classes: PositiveInt | None = Field(None, description="how many there are, if labels are numbers from 0 on")

    @property
    def file_columns(self) -> FileColumns:
        """See DataSpec."""
        return FileColumns((self.tree,), self.target)

    def found_at(self, path: str, *, field: str) -> Sequence[tuple[Folder, str, fs.FileInfo]]:
        """See OwnFilesSpec."""
        return files_at(path, field=field, endings=tuple(READERS))

    def open(self) -> Source:
        """See DataSpec."""
        read: dict[str, list[_Read]] = {}
        problems: list[Problem] = []
        for pool, files in self.files.items():
            read[pool] = []
            for folder, name, _ in files:
                for row in READERS[name[name.rindex(".") :].lower()](folder, name):
                    try:
                        read[pool].append(self._read(row))
                    except BadRows as error:
                        problems += error.problems
            if not read[pool] and not problems:
                raise UserError("data.path", f"no trees in {files[0][0]}/{files[0][1]}", "give files that have some")
        if problems:
            raise bad_rows(problems)
        each_node = read["train"][0].label is None
        names = self._names(read, each_node)
        number = {name: index for index, name in enumerate(names)}
        classes: dict[str, list[int]] = {}
        for pool, rows in read.items():
            classes[pool] = []
            for found in rows:
                for label in found.tree.labels if each_node else [found.label]:
                    if label is None:
                        problems.append(Problem(found.where, "a tree or node has no label", LEAVE_OUT))
                    elif label not in number:
                        problems.append(strange(label, found.where, names))
                    else:
                        classes[pool].append(number[label])
        if problems:
            raise bad_rows(problems)
        pools = {pool: [row.tree for row in rows] for pool, rows in read.items()}
        above = any(
            word is not None and below for row in read["train"] for word, below in zip(*row.tree[:2], strict=True)
        )
        return self.treebank(pools, classes, each_node=each_node, names=names, words_at="nodes" if above else "leaves")

    def _read(self, row: Row) -> _Read:
        """A row's tree and label. Raises BadRows."""
        values, where = row.values, row.where
        label = row.value(self.target) if self.target else None
        if self.tree in values:
            tree = self._nested(values[self.tree], row)
        elif self.words in values and self.heads in values:
            words, heads = row.value(self.words), row.value(self.heads)
            if not isinstance(words, list) or not isinstance(heads, list) or not all(map(is_number, heads)):
                raise bad(where, "words and heads are not two lists, of texts and of whole numbers")
            if label is None:
                raise bad(where, "words have no labels", "set data.target to the column of labels")
            each = label if isinstance(label, list) else [None] * len(words)
            marks = [None if mark is None else label_text(mark, where) for mark in each]
            tree = of_heads([str(word) for word in words], [int(head) for head in heads], marks, where=where)
            if isinstance(label, list):
                return _Read(tree, None, where)
        else:
            fix = did_you_mean(self.tree, values) if values else "name it in data.tree"
            raise bad(where, f"there is no {self.tree}, and no {self.words} with {self.heads}", fix)
        return _Read(tree, None if label is None else label_text(label, where), where)

    def _nested(self, found: Any, row: Row) -> FlatTree:
        labelled = self.target is None
        if not isinstance(found, str):
            raise bad(row.where, f"{self.tree} is no tree in brackets or nested lists")
        read = of_lists if found.lstrip(" ").startswith("[") else of_brackets
        return read(found, labelled=labelled, where=row.where, shift=row.shift.get(self.tree, 0))

    def _names(self, read: Mapping[str, list[_Read]], each_node: bool) -> tuple[str, ...]:
        """Of the classes: those of the model that this is other data for, so many numbers, or those that there are."""
        if known := self.known("target"):
            return known
        if self.classes is not None:
            return tuple(map(str, range(self.classes)))
        labels = (label for row in read["train"] for label in (row.tree.labels if each_node else [row.label]))
        return class_names(label for label in labels if label is not None)
