"""text_classification, sequence_labelling: columns of the user's Parquet, CSV, TSV or JSON-lines files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import pyarrow as pa
from pydantic import Field, model_validator

from cluster.data.layouts import Array
from cluster.data.sources.base import FileColumns, OwnFilesSpec, Part
from cluster.data.sources.columns import is_any_list, is_text, label_texts
from cluster.data.sources.labelled_text import LabelledTextSpec, Texts
from cluster.data.sources.parquet import Group, group_names
from cluster.data.tabular import TabularFile, found_files
from nn_models.columns import TextUnit
from nn_models.errors import UserError
from nn_models.spec import invalid


class _TextFilesSpec(OwnFilesSpec, LabelledTextSpec):
    """Base of the data sections of texts in rows of the user's files."""

    path: str = Field(min_length=1, description="a Parquet, CSV, TSV or JSON-lines file, or a folder of such; or a URI")
    group: Group = None

    def _columns(self) -> tuple[str, str]:
        """The names in the files: of the text, and of what labels it."""
        raise NotImplementedError

    @property
    def _each_token(self) -> bool:
        """Whether each token has a label."""
        return False

    @model_validator(mode="after")
    def _two_columns(self) -> Self:
        text, label = self._columns()
        if text == label:
            raise invalid(f"{label} is the text too, so there would be nothing to predict", "name another column")
        return self

    @property
    def file_columns(self) -> FileColumns:
        """See DataSpec."""
        text, label = self._columns()
        return FileColumns((text,), label, spaced=self._each_token, longest=self.max_length)

    def found_at(self, path: str, *, field: str) -> Sequence[tuple[Any, ...]]:
        """See OwnFilesSpec."""
        return found_files(path, field=field)

    def texts(self) -> Texts:
        """See LabelledTextSpec."""
        text, label = self._columns()
        pools: dict[str, list[Part]] = {}
        for pool, found in self.files.items():
            pools[pool] = []
            for file in [TabularFile(name) for name, _ in found]:
                for column in (text, label, *([self.group] if self.group else [])):
                    file.check(column)
                groups = enumerate(file.row_groups(label))
                pools[pool] += [Part(rows, (file.name, group), file.where(group)) for group, rows in groups if rows]
            if not pools[pool]:
                raise UserError(self.paths[pool][1], "no rows in there", "give files with some")
        return _FileTexts(text, label, self._each_token, pools, self.unit, self.group)


class TextClassificationSpec(_TextFilesSpec):
    """Your own texts with a class each, in columns of a Parquet, CSV, TSV or JSON-lines file."""

    kind: Literal["text_classification"] = "text_classification"
    text: str = Field("text", min_length=1, description="the column with the text, or with lists of its words")
    label: str = Field("label", min_length=1, description="the column with the class")

    def _columns(self) -> tuple[str, str]:
        return self.text, self.label


class SequenceLabellingSpec(_TextFilesSpec):
    """Your own texts with a label for each token, in columns of a Parquet, CSV, TSV or JSON-lines file.

    Tokens and labels are lists, or texts with spaces between them; of characters and bytes the tokens are a text.
    """

    kind: Literal["sequence_labelling"] = "sequence_labelling"
    tokens: str = Field("tokens", min_length=1, description="the column with the tokens")
    labels: str = Field("labels", min_length=1, description="the column with a label for each of them")

    def _columns(self) -> tuple[str, str]:
        return self.tokens, self.labels

    @property
    def _each_token(self) -> bool:
        return True


@dataclass(frozen=True)
class _FileTexts:
    """See Texts; parts are (file, row group)."""

    text: str
    label: str
    each_token: bool
    pools: Mapping[str, list[Part]]
    unit: TextUnit
    group: str | None

    @property
    def names(self) -> tuple[str, str]:
        """See Texts."""
        return f"column {self.text}", f"column {self.label}"

    def groups(self, part: Part) -> Array | None:
        """See Texts."""
        return group_names(_read(part, self.group), f"{part.name}, column {self.group}") if self.group else None

    def texts(self, part: Part) -> list[Any]:
        """See Texts."""
        column = _read(part, self.text)
        kind, unit = column.type, self.unit
        where = f"{part.name}, column {self.text}"
        if is_any_list(kind) and (pa.types.is_null(kind.value_type) or is_text(kind.value_type)):
            if unit != "words":
                raise UserError(where, f"lists, which are no {unit}", "make them texts, or set data.unit to words")
            return cast(list[Any], column.to_pylist())
        if not is_text(kind) and not pa.types.is_null(kind):
            wanted = "texts, or lists of words" if unit == "words" else "texts"
            raise UserError(where, f"values of type {kind} are no text", f"name a column of {wanted}")
        rows = column.to_pylist()
        apart = self.each_token and unit == "words"  # each space is between two tokens
        return [_between_spaces(text) if apart and text is not None else text for text in rows]

    def labels(self, part: Part) -> list[Any]:
        """See Texts."""
        column, where = _read(part, self.label), f"{part.name}, column {self.label}"
        if not self.each_token:
            return cast(list[Any], label_texts(column, where, or_numbers=False).to_pylist())
        if is_text(column.type):
            return [text if text is None else _between_spaces(text) for text in column.to_pylist()]
        if not is_any_list(column.type):
            raise UserError(where, f"values of type {column.type} are no labels of tokens", "make them lists, or texts")
        names = iter(label_texts(_flat(column), where, or_numbers=False).to_pylist())
        return [row if row is None else [next(names) for _ in row] for row in column.to_pylist()]


def _read(part: Part, column: str) -> pa.ChunkedArray:
    file, group = part.what
    found = TabularFile(file).read([column], group, texts=[column])[column]
    return found.cast(found.type.value_type) if pa.types.is_dictionary(found.type) else found


def _between_spaces(text: str) -> list[str]:
    """What stands between spaces, of which other kinds, such as U+00A0, belong to a token."""
    return [token for token in text.split(" ") if token]


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
