"""Vocabulary: a text as numbers of its characters, bytes or words, and back."""

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nn_models.columns import UNKNOWN, TextUnit, Tokens
from nn_models.errors import UserError

WORD = re.compile(r"\w+|[^\w\s]|\n")  # a word, a mark, or the end of a line
CLOSING, OPENING = frozenset(".,;:!?)]}%'\n"), frozenset("([{'\n")  # marks without a space before, or after them
MOST_TOLD = 5


@dataclass(frozen=True)
class Vocabulary:
    """The tokens by their numbers, and what a token is."""

    names: tuple[str, ...]
    unit: TextUnit

    @classmethod
    def of_text(cls, text: str | bytes, unit: TextUnit, *, max_words: int) -> "Vocabulary":
        """All characters of a text by their code points; all bytes; its most frequent words, UNKNOWN for the others."""
        if unit == "bytes":
            return cls(tuple(map(_byte_name, range(256))), unit)
        assert isinstance(text, str)
        if unit == "characters":
            return cls(tuple(sorted(set(text))), unit)
        known = _by_frequency(Counter(WORD.findall(text)))
        return cls(tuple(known) if len(known) <= max_words else (UNKNOWN, *known[: max_words - 1]), unit)

    @classmethod
    def of_counts(cls, counts: Mapping[str, int], unit: TextUnit, *, max_words: int, min_count: int) -> "Vocabulary":
        """The most frequent tokens, each so often at least, and UNKNOWN for all others; of bytes always all."""
        if unit == "bytes":
            return cls(tuple(map(_byte_name, range(256))), unit)
        frequent = {token: count for token, count in counts.items() if count >= min_count and token != UNKNOWN}
        known = _by_frequency(frequent)[: max_words - 1]
        return cls((UNKNOWN, *(sorted(known) if unit == "characters" else known)), unit)

    @classmethod
    def of_column(cls, column: Tokens) -> "Vocabulary":
        """Of a column that says what its tokens are. Raises UserError for one that does not."""
        if column.unit is None or not column.names:
            raise UserError("data", "its tokens have no names, so there is no text to be made of them", "name them")
        return cls(column.names, column.unit)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        """Of characters: their code points, which are in order; without UNKNOWN, which comes first where it is."""
        return np.array([ord(name) for name in self.names[self._named_first :]], np.uint32)

    @property
    def _named_first(self) -> int:
        return int(self.names[:1] == (UNKNOWN,))

    def split(self, text: str | Sequence[str]) -> Sequence[str]:
        """The names of a text's tokens, whether the vocabulary has them or not; those of a list are as they are."""
        if not isinstance(text, str):
            return text
        if self.unit == "bytes":
            return [self.names[byte] for byte in text.encode()]
        return WORD.findall(text) if self.unit == "words" else text

    def numbers(self, text: str | bytes | Sequence[str], *, path: str) -> NDArray[np.int32]:
        """The tokens of a text, or those that a list has. What is not in the vocabulary is UNKNOWN.

        Raises UserError, of the path, for such tokens where the vocabulary has no UNKNOWN.
        """
        if self.unit == "bytes" and isinstance(text, str | bytes):
            content = text.encode() if isinstance(text, str) else text
            return np.frombuffer(content, np.uint8).astype(np.int32)
        assert not isinstance(text, bytes)
        other = 0 if self._named_first else -1
        if self.unit == "characters" and isinstance(text, str):
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            numbers = np.searchsorted(self._points, points).astype(np.int32)
            strange = self._points[np.minimum(numbers, len(self._points) - 1)] != points if len(self._points) else True
            numbers = np.where(strange, other, numbers + self._named_first).astype(np.int32)
        else:
            tokens = self.split(text)
            numbers = np.fromiter((self._by_name.get(token, other) for token in tokens), np.int32, len(tokens))
        if len(numbers) and numbers.min() < 0:
            few = told(self.unknown(text))
            raise UserError(path, f"{few} not in the text that the model has learned from", "leave them out")
        return numbers

    def unknown(self, text: str | Sequence[str]) -> list[str]:
        """The names of the text's tokens that are not in the vocabulary, each once."""
        return [token for token in dict.fromkeys(self.split(text)) if token not in self._by_name]

    def spelled(self, numbers: Iterable[int]) -> Iterator[str]:
        """What each token adds to the text: of words with the space before it, of bytes whole characters only."""
        if self.unit == "bytes":
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            yield from (decoder.decode(bytes([number])) for number in numbers)
        elif self.unit == "characters":
            yield from (self.names[number] for number in numbers)
        else:
            before = "\n"
            for number in numbers:
                word = self.names[number]
                yield word if word in CLOSING or before in OPENING else f" {word}"
                before = word


def told(tokens: Sequence[str]) -> str:
    """Some tokens for people, the first few of them."""
    return ", ".join(map(repr, tokens[:MOST_TOLD])) + ", …" * (len(tokens) > MOST_TOLD)


def _by_frequency(counts: Mapping[str, int]) -> list[str]:
    """The tokens, the most frequent first."""
    return sorted(counts, key=lambda token: (-counts[token], token))


def _byte_name(value: int) -> str:
    return chr(value) if 32 <= value < 127 else f"<{value:02x}>"
