"""A run's files as a report reads them: whatever is absent or broken is noted, never raised."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from cluster.storage import Folder
from nn_models.errors import UserError

Array = NDArray[Any]

BROKEN = (
    UserError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    RecursionError,
    yaml.YAMLError,
    SafetensorError,
)


class AbsentError(Exception):
    """Nothing is wrong, but this run has no such part."""


@contextmanager
def left_out(notes: list[str], part: str, *, file: str) -> Iterator[None]:
    """No problem inside fails the report: it becomes a note on the page."""
    try:
        yield
    except AbsentError as reason:
        notes.append(f"{part}: {reason}.")
    except FileNotFoundError:
        notes.append(f"{part}: the run has no {file}.")
    except BROKEN as error:
        notes.append(f"{part}: {file} cannot be read ({type(error).__name__}: {str(error)[:300]}).")


class Tensors:
    """A safetensors file read piecewise: the first layer of a large model costs only its own bytes."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        with folder.filesystem.open_input_file(folder.full(name)) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:  # the format's own limit
                raise ValueError("not a safetensors file")
            self.header = mapping(json.loads(file.read(length)))
        self.metadata: dict[str, Any] = mapping(self.header.pop("__metadata__", None))
        self.shapes: dict[str, tuple[int, ...]] = {key: tuple(entry["shape"]) for key, entry in self.header.items()}
        self.start = 8 + length

    def __contains__(self, key: str) -> bool:
        return key in self.header

    def __getitem__(self, key: str) -> Array:
        begin, end = self.header[key]["data_offsets"]
        with self.folder.filesystem.open_input_file(self.folder.full(self.name)) as file:
            if not 0 <= begin <= end <= file.size() - self.start:
                raise ValueError(f"{key} stands at {begin} to {end}, outside of the file")
            content = file.read_at(end - begin, self.start + begin)
        if self.header[key]["dtype"] == "BF16":  # unknown to NumPy: the upper half of a float32
            upper = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
            return upper.view(np.float32).reshape(self.shapes[key])
        header = json.dumps({key: self.header[key] | {"data_offsets": [0, end - begin]}}).encode()
        array: Array = load(len(header).to_bytes(8, "little") + header + content)[key]
        return array


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines in order of their steps, and how many are unreadable; a step repeated after a restart counts once."""
    records: dict[tuple[float, str, bool], dict[str, Any]] = {}
    num_unreadable = 0
    for line in filter(None, content.splitlines()):
        try:
            record = json.loads(line)
            key = (record["step"], str(record.get("split", "train")), bool(record.get("end_of_epoch")))
            if not is_number(key[0]):
                raise TypeError
        except (*BROKEN, AttributeError):  # a run that was killed leaves half a line
            num_unreadable += 1
            continue
        records[key] = record
    return [records[key] for key in sorted(records)], num_unreadable


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100  # so neither NaN
