"""Text: a user's files, or the standard library's own, as windows of one long stream of tokens."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, PrivateAttr

from cluster.data.layouts import Dense, Layout
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.sources.base import DataSpec, DrawnTestSpec, Part, Source, absolute, even_parts
from cluster.data.split import Traits
from cluster.data.tabular import found_files, read_content
from cluster.data.vocabulary import UNKNOWN, Vocabulary
from nn_models.columns import Labels, TextUnit, Tokens
from nn_models.errors import UserError

PART_WINDOWS = 4096


class _StreamSpec(DrawnTestSpec):
    """Base of the data sections of one long text; held out are its last parts, the test split the very last."""

    order: ClassVar[Literal["shuffled", "streams"]] = "streams"
    unit: TextUnit = Field("characters", description="what a token is; words are runs of letters and digits, and marks")
    window: PositiveInt = Field(128, description="tokens of a row; what is left over at the end is not used")
    max_words: Annotated[int, Field(ge=2)] = Field(
        30_000, description=f"words of the vocabulary, the most frequent ones; all others become {UNKNOWN}"
    )

    # what a model has learned, where this is other data for it
    _known: Vocabulary | None = PrivateAttr(None)

    def text(self) -> str | bytes:
        """All of it; bytes where these are the tokens. Raises UserError where there is none."""
        raise NotImplementedError

    def open(self) -> Source:
        """See DataSpec."""
        text = self.text()
        vocabulary = self._known or Vocabulary.of_text(text, self.unit, max_words=self.max_words)
        tokens = vocabulary.numbers(text, path="data")
        if len(tokens) < self.window + 1:
            raise UserError(
                "data.window",
                f"{self.window} {self.unit} and the one that follows, but the text has {len(tokens)}",
                "set a smaller window, or give more text",
            )
        return _Stream(tokens, vocabulary, self.window)

    def identity(self) -> dict[str, Any]:
        """See DataSpec."""
        return {**super().identity(), **({} if self._known is None else {"known": self._known.names})}

    def fitted_to(self, manifest: Manifest) -> DataSpec:
        """See DataSpec: with the tokens of the model, and windows as it has read them."""
        tokens = manifest.columns["input"].column
        if not isinstance(tokens, Tokens) or not tokens.unit or tokens.length is None:
            return self  # a model of other rows: it refuses these
        fitted = self.model_copy(update={"unit": tokens.unit, "window": tokens.length})
        fitted._known = Vocabulary.of_column(tokens)
        return fitted

    def fingerprint(self) -> str:
        """See DataSpec."""
        text = self.text()
        return hashlib.sha256(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")).hexdigest()


class TextSpec(_StreamSpec):
    """Your own text: a file, or all files of a folder, one after the other by their names."""

    kind: Literal["text"] = "text"
    path: str = Field(min_length=1, description="a text file in UTF-8, or a folder of such files; or a URI")

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={"path": absolute(self.path, base)})

    def text(self) -> str | bytes:
        """See _StreamSpec."""
        files = sorted((name for name, _ in found_files(self.path, field="data.path", endings=())), key=_in_order)
        parts = [_read(name, self.unit) for name in files]
        text: str | bytes = b"".join(parts) if self.unit == "bytes" else "".join(parts)  # type: ignore[arg-type]
        if not text:
            raise UserError("data.path", f"{self.path}: no text in there", "give a file that has some")
        return text


class PythonDocsSpec(_StreamSpec):
    """What Python's own help says of the language: English text that is on every machine."""

    kind: Literal["python_docs"] = "python_docs"

    def text(self) -> str | bytes:
        """See _StreamSpec."""
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        return text.encode() if self.unit == "bytes" else text


@dataclass(frozen=True)
class _Stream:
    """The tokens of a text, and the vocabulary."""

    tokens: NDArray[np.int32]
    vocabulary: Vocabulary
    window: int

    @cached_property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        names, size, length = self.vocabulary.names, len(self.vocabulary.names), self.window
        words = Tokens(names=names, size=size, length=length, unit=self.vocabulary.unit)
        return {
            "input": StoredColumn(column=words, dtype="int32"),
            "target": StoredColumn(column=Labels(size=size, length=length), dtype="int32"),
        }

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return {"train": even_parts((len(self.tokens) - 1) // self.window, PART_WINDOWS)}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        return Traits()

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source: windows of tokens, and of those that follow each."""
        first, end = (window * self.window for window in part.what)
        return {
            name: Dense(self.tokens[first + shift : end + shift].reshape(part.rows, self.window))
            for name, shift in (("input", 0), ("target", 1))
        }


def _in_order(name: str) -> list[str]:
    """What files are ordered by: the names of their folders, and then their own."""
    return name.split("/")


def _read(name: str, unit: TextUnit) -> str | bytes:
    content = bytes(read_content(name))
    try:
        return content if unit == "bytes" else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            name, f"no UTF-8 text (byte {error.start})", "convert or remove it, or set data.unit to bytes"
        ) from None
