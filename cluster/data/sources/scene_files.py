"""scene_files: the user's own segmented pictures, as graphs of segments, from Parquet or JSON lines."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs
from pydantic import Field

from cluster.data.sources.base import BadRows, DrawnTestSpec, OwnFilesSpec, Source, bad_rows, each
from cluster.data.sources.flat_trees import bad
from cluster.data.sources.own_rows import (
    LEAVE_OUT,
    ListText,
    Row,
    class_names,
    files_at,
    is_number,
    json_rows,
    label_text,
    parquet_rows,
)
from cluster.data.sources.scenes import StoredScene, StoredScenes
from cluster.storage import Folder
from nn_models.columns import Scene
from nn_models.errors import Problem, UserError

FLOAT32_MAX = float(np.finfo(np.float32).max)
READERS = {".parquet": parquet_rows, ".jsonl": json_rows, ".json": json_rows}


class _Read(NamedTuple):
    """`features` (n, W), `edges` (m, 2), and the label of each segment."""

    features: NDArray[np.float32]
    edges: NDArray[np.int64]
    objects: Sequence[str]
    where: str


class SceneFilesSpec(OwnFilesSpec, DrawnTestSpec):
    """Your own segmented pictures, a row each, in Parquet files or JSON lines, with the label of each segment.

    `{"features": [[0.1, 2], [0.3, 1], [7, 0]], "edges": [[0, 1], [1, 2]], "objects": ["sky", "sky", "tree"]}`: numbers
    of each segment, which a net is given as they are, pairs of adjacent ones, counted from 0, and the label of what
    each is of, which need only differ within a scene. An object is what hangs together under one label: its segments
    are right to join before all others.
    """

    kind: Literal["scene_files"] = "scene_files"
    features: str = Field("features", min_length=1, description="the column of lists of numbers, one a segment")
    edges: str = Field("edges", min_length=1, description="that of pairs of adjacent segments")
    objects: str = Field("objects", min_length=1, description="that of lists of labels, one a segment")

    def found_at(self, path: str, *, field: str) -> Sequence[tuple[Folder, str, fs.FileInfo]]:
        """See OwnFilesSpec."""
        return files_at(path, field=field, endings=tuple(READERS))

    def open(self) -> Source:
        """See DataSpec."""
        read: dict[str, list[_Read]] = {}
        problems: list[Problem] = []
        for pool, files in self.files.items():
            rows = [row for folder, name, _ in files for row in READERS[name[name.rindex(".") :].lower()](folder, name)]
            if not rows:
                raise UserError("data.path", f"no scenes in {files[0][0]}/{files[0][1]}", "give files that have some")
            try:
                read[pool] = each(self._read, rows)
            except BadRows as error:
                problems += error.problems
        if problems:
            raise bad_rows(problems)
        every = [row for rows in read.values() for row in rows]
        names = class_names(label for row in every for label in row.objects)
        width = read["train"][0].features.shape[1]
        for row in every:
            if row.features.shape[1] != width:
                what = f"segments of {row.features.shape[1]} numbers, where those of the first scene have {width}"
                problems.append(Problem(row.where, what, LEAVE_OUT))
        if problems:
            raise bad_rows(problems)
        number = {name: place for place, name in enumerate(names)}
        degree = max(1, *(_counts(row).max() for row in every))
        pools = {pool: [_stored(row, number, degree) for row in rows] for pool, rows in read.items()}
        return StoredScenes(Scene(width=width, degree=degree, names=names), pools)

    def _read(self, row: Row) -> _Read:
        """Raises BadRows."""
        features, edges, objects = (_nested(row, name) for name in (self.features, self.edges, self.objects))
        numbers = _matrix(features, row, self.features)
        num = len(numbers)
        if not isinstance(objects, list) or len(objects) != num:
            count = len(objects) if isinstance(objects, list) else "no list of"
            raise bad(row.where, f"{count} labels in {self.objects}, where {self.features} has {num} segments")
        if not isinstance(edges, list):
            raise bad(row.where, f"{self.edges} is no list of pairs of segments")
        for edge in edges:
            if not isinstance(edge, list) or len(edge) != 2 or not all(map(is_number, edge)):
                raise bad(row.where, f"{edge!r} in {self.edges} is no pair of segments")
            if not all(0 <= place < num for place in edge):
                raise bad(row.where, f"{edge} in {self.edges}, where there are {num} segments, counted from 0")
            if edge[0] == edge[1]:
                raise bad(row.where, f"{edge} in {self.edges}: a segment is not adjacent to itself")
        labels = [label_text(label, row.where) for label in objects]
        ordered = np.unique(np.sort(np.array(edges, np.int64).reshape(-1, 2), 1), axis=0)
        return _Read(numbers, ordered, labels, row.where)


def _nested(row: Row, name: str) -> Any:
    """A value that may be nested lists. Raises BadRows."""
    value = row.value(name)
    if not isinstance(value, ListText):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise bad(row.where, f"{name} cannot be read ({error})") from None


def _matrix(segments: Any, row: Row, name: str) -> NDArray[np.float32]:
    """The numbers of each segment, of which all have as many. Raises BadRows."""
    if not isinstance(segments, list) or not segments:
        raise bad(row.where, f"{name} is no list of segments" if segments != [] else "a scene without segments")
    for place, numbers in enumerate(segments):
        if not isinstance(numbers, list) or not numbers or not all(map(_is_float32, numbers)):
            raise bad(row.where, f"segment {place} in {name} is no list of numbers that float32 can hold")
        if len(numbers) != len(segments[0]):
            what = f"segment {place} has {len(numbers)} numbers in {name}, where segment 0 has {len(segments[0])}"
            raise bad(row.where, what)
    return np.array(segments, np.float32)


def _is_float32(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= FLOAT32_MAX  # not so of NaN


def _counts(row: _Read) -> NDArray[np.int64]:
    """(n,): how many neighbours each segment names, of two adjacent ones the first."""
    return np.bincount(row.edges[:, 0], minlength=len(row.objects))


def _stored(row: _Read, number: Mapping[str, int], degree: int) -> StoredScene:
    counts, first = _counts(row), row.edges[:, 0]
    neighbours = np.full((len(counts), degree), -1, np.int32)
    neighbours[first, np.arange(len(first)) - (counts.cumsum() - counts)[first]] = row.edges[:, 1]
    return StoredScene(row.features, neighbours, np.array([number[label] for label in row.objects], np.int32))
