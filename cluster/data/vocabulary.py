"""Vocabulary: a text as numbers of its characters, bytes or words, and back."""

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nn_models.columns import TextUnit, Tokens
from nn_models.errors import UserError

UNKNOWN = "<unknown>"  # stands for the words that are not in the vocabulary
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
        counts = Counter(WORD.findall(text))
        known = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(known) if len(known) <= max_words else (UNKNOWN, *known[: max_words - 1]), unit)

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
        """Of characters: their code points, which are in order."""
        return np.array([ord(name) for name in self.names], np.uint32)

    def numbers(self, text: str | bytes, *, path: str) -> NDArray[np.int32]:
        """The text's tokens. Raises UserError, of the path, where it has some that are not in the vocabulary."""
        if self.unit == "bytes":
            content = text.encode() if isinstance(text, str) else text
            return np.frombuffer(content, np.uint8).astype(np.int32)
        assert isinstance(text, str)
        if self.unit == "words":
            words, other = WORD.findall(text), self._by_name.get(UNKNOWN, -1)
            numbers = np.fromiter((self._by_name.get(word, other) for word in words), np.int32, len(words))
        else:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            numbers = np.searchsorted(self._points, points).astype(np.int32)
            numbers[self._points[np.minimum(numbers, len(self._points) - 1)] != points] = -1
        if len(numbers) and numbers.min() < 0:
            tokens = list(text) if self.unit == "characters" else WORD.findall(text)
            strange = list(dict.fromkeys(repr(token) for token in tokens if token not in self._by_name))
            few = ", ".join(strange[:MOST_TOLD]) + ", …" * (len(strange) > MOST_TOLD)
            raise UserError(path, f"{few} not in the text that the model has learned from", "leave them out")
        return numbers

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


def _byte_name(value: int) -> str:
    return chr(value) if 32 <= value < 127 else f"<{value:02x}>"
