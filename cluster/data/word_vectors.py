"""Word vectors of a user's file: text as word2vec and GloVe write it, or safetensors with the words beside them."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from cluster.storage import Folder
from nn_models.errors import UserError
from nn_models.word_vectors import WantedVectors

WORDS = "words"  # in the metadata of a safetensors file: a JSON list, a word for each row of its only tensor
BLOCK_BYTES = 1 << 20


class WordVectors(NamedTuple):
    """Of n of the wanted words: their places (n,) int64 among these, and their vectors (n, size) float32."""

    places: NDArray[np.int64]
    vectors: NDArray[np.float32]


def read_vectors(wanted: WantedVectors) -> WordVectors:
    """The vectors of those wanted words that the file has; of several of one word the first.

    A text file has a line for each word, with spaces between it and the numbers, and may begin with a line of two
    whole numbers (word2vec's); .gz and the like are unpacked. Raises UserError where it cannot be read, where vectors
    are of another size or no numbers, or where it has none of the words.
    """
    place = Folder(wanted.path)
    name = place.uri.partition("?")[0].lower()
    found = _from_safetensors(place, wanted) if name.endswith(".safetensors") else _from_text(place, wanted)
    if not found:
        raise UserError(
            f"model.{wanted.field}",
            f"{wanted.path} has a vector for none of the {len(wanted.words):,} words of the vocabulary",
            "give vectors of words of this language, written as in the texts",
        )
    places = sorted(found)
    vectors = np.stack([found[number] for number in places])
    if not np.isfinite(vectors).all():
        word = wanted.words[places[int(np.argmin(np.isfinite(vectors).all(1)))]]
        raise UserError(wanted.path, f"NaN or infinity in the vector of {word!r}", "mend the file")
    return WordVectors(np.array(places, np.int64), vectors)


def _from_text(place: Folder, wanted: WantedVectors) -> dict[int, NDArray[np.float32]]:
    known = {word.encode("utf-8", "surrogatepass"): number for number, word in enumerate(wanted.words)}
    found: dict[int, NDArray[np.float32]] = {}
    for number, line in enumerate(_lines(place, wanted), start=1):
        if number == 1 and len(fields := line.split()) == 2 and all(field.isdigit() for field in fields):
            _check_size(int(fields[1]), wanted)
            continue
        if number == 1:
            _check_size(len(line.rstrip().split(b" ")) - 1, wanted)
        if line.partition(b" ")[0] not in known:
            continue
        word, *numbers = line.rstrip().rsplit(b" ", wanted.size)  # a word may have spaces in it: then it is not known
        if (row := known.get(word)) is None or row in found:
            continue
        try:
            found[row] = np.array(numbers, np.float32)
        except ValueError:
            found[row] = np.empty(0, np.float32)
        if len(found[row]) != wanted.size:
            text = line[:60].decode(errors="replace").rstrip()
            raise UserError(f"{wanted.path}, line {number}", f"no word and {wanted.size} numbers: {text}", "mend it")
    return found


def _lines(place: Folder, wanted: WantedVectors) -> Iterator[bytes]:
    try:
        if not place.exists():
            raise UserError(f"model.{wanted.field}", f"{wanted.path}: no such file", "check the path")
        with place.filesystem.open_input_stream(place.path, buffer_size=BLOCK_BYTES) as stream:
            held = b""
            while block := stream.read(BLOCK_BYTES):
                *lines, held = (held + block).split(b"\n")
                yield from (line for line in lines if line.strip())
            if held.strip():
                yield held
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"model.{wanted.field}", f"{wanted.path} cannot be read ({error})", "check the file") from None


def _from_safetensors(place: Folder, wanted: WantedVectors) -> dict[int, NDArray[np.float32]]:
    fix = f"keep one tensor (words, numbers), and in the metadata {WORDS!r}, a JSON list of the words"
    folder, _, name = place.uri.rpartition("/")
    try:
        content = Folder(folder).read_bytes(name)
        tensors = load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        words = json.loads(metadata.get(WORDS, "null"))
    except FileNotFoundError:
        raise UserError(f"model.{wanted.field}", f"{wanted.path}: no such file", "check the path") from None
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(wanted.path, f"not a safetensors file that can be read ({error})", fix) from None
    if not isinstance(words, list) or len(tensors) != 1:
        raise UserError(wanted.path, f"{len(tensors)} tensors, {'with' if words else 'without'} a list of words", fix)
    (vectors,) = tensors.values()
    if vectors.ndim != 2 or len(vectors) != len(words) or vectors.dtype.kind != "f":
        what = f"{len(words):,} words for a tensor of {vectors.dtype} of shape {vectors.shape}"
        raise UserError(wanted.path, what, fix)
    _check_size(vectors.shape[1], wanted)
    rows = {word: row for row, word in reversed([*enumerate(words)]) if isinstance(word, str)}
    return {number: vectors[rows[word]].astype(np.float32) for number, word in enumerate(wanted.words) if word in rows}


def _check_size(size: int, wanted: WantedVectors) -> None:
    if size != wanted.size:
        raise UserError(
            f"model.{wanted.size_field}",
            f"{wanted.size}, but the vectors of {wanted.path} have {size} numbers",
            f"set model.{wanted.size_field} to {size}" if size > 0 else "give a file of word vectors",
            names=(f"model.{wanted.size_field}",),
        )
