"""The user's files of nested values, row by row: Parquet, JSON lines, lines of text, CoNLL-U."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyarrow import fs

from cluster.data.sources.flat_trees import LISTS, bad
from cluster.data.sources.treebank import read_lines
from cluster.data.tables import ParquetFile, UnreadableError
from cluster.storage import Folder
from nn_models.errors import Problem, UserError, did_you_mean

COMMENT = re.compile(r"#\s*([^=]+?)\s*=\s*(.*?)\s*$")
CONLLU_FIELDS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
LEAVE_OUT = "mend the row, or take it out"
SPACE = re.compile(r"[ \t]*")


class ListText(str):
    """A JSON list as it is written."""

    def read(self) -> Any:
        """The list, where nothing is nested in it; else the text."""
        return json.loads(self) if self.count("[") == 1 else self


@dataclass(frozen=True)
class Row:
    """A row's values by name, and where it stands; `shift` is the place in its line where a value's text begins."""

    values: Mapping[str, Any]
    where: str
    shift: Mapping[str, int] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """The value of this name. Raises BadRows where there is none."""
        if name not in self.values:
            raise bad(self.where, f"there is no {name}", did_you_mean(name, self.values))
        value = self.values[name]
        return value.read() if isinstance(value, ListText) else value


def label_text(label: Any, where: str) -> str:
    """A label as a text. Raises BadRows where it is neither that nor a whole number."""
    if isinstance(label, bool | list | dict) or label is None or (isinstance(label, float) and not label.is_integer()):
        raise bad(where, f"the label {json.dumps(label, default=str)} is neither a text nor a whole number")
    return str(int(label)) if isinstance(label, float) else str(label)


def is_number(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Of the classes that have these labels: 0 to the highest where all are numbers, else the sorted texts."""
    known = set(labels)
    if all(label.isascii() and label.isdigit() and str(int(label)) == label for label in known):
        return tuple(map(str, range(max(map(int, known), default=0) + 1)))
    return tuple(sorted(known))


def strange(label: str, where: str, names: Sequence[str]) -> Problem:
    """What is said of a label that is none of the classes'."""
    few = ", ".join(names[:5]) + ", …" * (len(names) > 5)
    return Problem(where, f"the label {label!r} is none of {few}", LEAVE_OUT)


def files_at(path: str, *, field: str, endings: tuple[str, ...]) -> list[tuple[Folder, str, fs.FileInfo]]:
    """A file, or those of a folder by their names: the folder, the name in it, what storage says. Raises UserError."""
    folder = Folder(path)
    info = folder.info()
    if info.type == fs.FileType.NotFound:
        raise UserError(field, f"{path}: no such file or folder", "check the path")
    if info.type == fs.FileType.File:
        if not path.lower().endswith(endings):
            raise UserError(field, f"{path}: not one of {', '.join(endings)}", "rename or convert it")
        base, _, name = folder.uri.rpartition("/")
        return [(Folder(base or "/"), name, info)]
    found = [(folder, name, info) for name, info in sorted(folder.walk(), key=lambda pair: pair[0]) if info.is_file]
    found = [file for file in found if file[1].lower().endswith(endings)]
    if not found:
        raise UserError(field, f"{path}: no files that end in {', '.join(endings)}", "give a folder that has some")
    for _, name, _ in found:
        folder.check_name(name)
    return found


def line_rows(folder: Folder, name: str) -> Iterator[Row]:
    """A tree a line."""
    for number, line in enumerate(read_lines(folder, name), start=1):
        if line.strip(" "):
            yield Row({"tree": line}, f"{folder}/{name}, line {number}")


def json_rows(folder: Folder, name: str) -> Iterator[Row]:
    """An object a line; a list stays a text, however deep it is, until it is known what it is of."""
    for number, line in enumerate(read_lines(folder, name), start=1):
        if line.strip():
            yield _object(line, f"{folder}/{name}, line {number}")


def _object(line: str, where: str) -> Row:
    """The fields of a JSON object."""
    decoder = json.JSONDecoder()
    values: dict[str, Any] = {}
    shift: dict[str, int] = {}
    place = _skip(line, 0)
    try:
        if line[place : place + 1] != "{":
            raise ValueError("not an object")
        place = _skip(line, place + 1)
        while line[place : place + 1] != "}":
            key, place = decoder.raw_decode(line, place)
            place = _skip(line, place)
            if line[place : place + 1] != ":" or not isinstance(key, str):
                raise ValueError("no name and value")
            place = _skip(line, place + 1)
            first = place
            if line[place : place + 1] == "[":
                place = _list_end(line, place)
                values[key] = ListText(line[first:place])
            else:
                values[key], place = decoder.raw_decode(line, place)
            shift[key] = first + (line[first] == '"')
            place = _skip(line, place)
            if line[place : place + 1] == ",":
                place = _skip(line, place + 1)
            elif line[place : place + 1] != "}":
                raise ValueError("neither , nor }")
        if line[place + 1 :].strip():
            raise ValueError("text after the object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}, column {place + 1}", f"no JSON object ({error})", "give one object a line") from None
    return Row(values, where, shift)


def _skip(line: str, place: int) -> int:
    match = SPACE.match(line, place)
    assert match is not None
    return match.end()


def _list_end(line: str, first: int) -> int:
    """The place behind the list that begins at `first`."""
    depth = 0
    for match in LISTS.finditer(line, first):
        depth += (match[0] == "[") - (match[0] == "]")
        if not depth:
            return match.end()
    raise ValueError("a list is opened and not closed")


def parquet_rows(folder: Folder, name: str) -> Iterator[Row]:
    """The rows of a Parquet file, all its columns."""
    where = f"{folder}/{name}"
    try:
        with folder.filesystem.open_input_file(folder.full(name)) as source:
            file = ParquetFile(source)
            names = list(file.schema.names)
            for group in range(len(file.row_groups)):
                for index, values in enumerate(file.read(names, group).to_pylist()):
                    yield Row(values, f"{where}, row group {group}, row {index}")
    except (OSError, UnreadableError) as error:
        raise UserError(where, f"cannot be read ({error})", "check the file") from None


def conllu_rows(folder: Folder, name: str) -> Iterator[Row]:
    """The sentences of a CoNLL-U file (universaldependencies.org/format): words, heads, tags, and comments by name.

    Words of several tokens (1-2) and words that are not there (1.1) are left out.
    """
    words: list[list[str]] = []
    comments: dict[str, str] = {}
    began = 1
    for number, line in enumerate([*read_lines(folder, name), ""], start=1):
        where = f"{folder}/{name}, line {number}"
        if not line.strip():
            if words:
                yield _sentence(words, comments, f"{folder}/{name}, line {began}")
            words, comments, began = [], {}, number + 1
        elif line.startswith("#"):
            if match := COMMENT.match(line):
                comments[match[1]] = match[2]
        else:
            found = line.split("\t")
            if len(found) != len(CONLLU_FIELDS):
                raise UserError(
                    where, f"{len(found)} fields, not {len(CONLLU_FIELDS)} with tabs between", "mend the line"
                )
            if "-" in found[0] or "." in found[0]:
                continue
            if found[0] != str(len(words) + 1):
                raise UserError(where, f"the word number {found[0]!r} after {len(words)}", "number words from 1 on")
            if not found[6].isascii() or not found[6].isdigit():
                raise UserError(where, f"the head {found[6]!r} is no number", "give each word its head")
            words.append(found)


def _sentence(words: list[list[str]], comments: Mapping[str, str], where: str) -> Row:
    columns = dict(zip(CONLLU_FIELDS, map(list, zip(*words, strict=True)), strict=True))
    tags = {name: columns[name] for name in ("upos", "xpos", "deprel")}
    return Row({**comments, **tags, "words": columns["form"], "heads": [int(head) for head in columns["head"]]}, where)
