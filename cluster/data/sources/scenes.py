"""Scenes: pictures of a few objects, each in several segments, generated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from cluster.data.layouts import Layout, Ragged
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import DrawnTestSpec, Part, Source, parts_of
from cluster.data.split import Traits
from nn_models.columns import Scene

CLASSES = ("sky", "tree", "road", "water")
LOOKS = 2  # of each class: a segment has one of them, and no look is like another
PART_ROWS = 8192


class ScenesSpec(DrawnTestSpec):
    """Pictures of objects that are cut into segments: a parser is to join those of one object before others.

    A square of cells is shared among segments, and these among objects, each by which centre is nearest. A segment's
    features are one of two looks of its object's class, and noise: which looks belong together is to be learned.
    """

    kind: Literal["scenes"] = "scenes"
    rows: PositiveInt = Field(2000, description="scenes that are drawn, for all splits together")
    side: Annotated[int, Field(ge=4, le=256)] = Field(12, description="cells along each side of a scene")
    segments: Annotated[int, Field(ge=2, le=16)] = Field(14, description="of a scene, at most; at least half of them")
    objects: PositiveInt = Field(4, description="centres of objects in a scene")
    noise: NonNegativeFloat = Field(0.3, description="standard deviation of each feature")
    seed: NonNegativeInt = Field(0, description="what they are drawn from")

    def open(self) -> Source:
        """See DataSpec."""
        generator = np.random.default_rng(self.seed)
        column = Scene(width=LOOKS * len(CLASSES), degree=self.segments - 1, names=CLASSES)
        return StoredScenes(column, {"train": [drawn(generator, self) for _ in range(self.rows)]})


class StoredScene(NamedTuple):
    """`features` (n, W), `neighbours` (n, degree), -1 for none, and `objects` (n,), the classes."""

    features: NDArray[np.float32]
    neighbours: NDArray[np.int32]
    objects: NDArray[np.int32]


def drawn(generator: np.random.Generator, spec: ScenesSpec) -> StoredScene:
    """A scene; all of its segments hang together."""
    num = int(generator.integers((spec.segments + 1) // 2, spec.segments + 1))
    cells = np.stack(np.divmod(np.arange(spec.side**2), spec.side), 1)
    centres = cells[generator.choice(len(cells), num, replace=False)]
    segment = _nearest(cells, centres).reshape(spec.side, spec.side)
    adjacent = np.zeros((num, num), bool)
    for one, other in ((segment[1:], segment[:-1]), (segment[:, 1:], segment[:, :-1])):
        adjacent[one, other] = adjacent[other, one] = True
    np.fill_diagonal(adjacent, False)
    neighbours = np.full((num, spec.segments - 1), -1, np.int32)
    for place, row in enumerate(adjacent):
        found = row.nonzero()[0]
        neighbours[place, : len(found)] = found
    classes = generator.integers(len(CLASSES), size=spec.objects)
    objects = classes[_nearest(centres, generator.uniform(0, spec.side, (spec.objects, 2)))]
    looks = np.eye(LOOKS * len(CLASSES))[LOOKS * objects + generator.integers(LOOKS, size=num)]
    features = looks + generator.normal(0, spec.noise, looks.shape)
    return StoredScene(features.astype(np.float32), neighbours, objects.astype(np.int32))


def _nearest(points: NDArray[np.generic], centres: NDArray[np.generic]) -> NDArray[np.int64]:
    """(points,): which centre is nearest, the first of equally near ones."""
    return np.square(points[:, None].astype(float) - centres[None].astype(float)).sum(2).argmin(1)


@dataclass(frozen=True)
class StoredScenes:
    """A source of the scenes of each pool."""

    column: Scene
    scenes: Mapping[str, Sequence[StoredScene]]

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        return {"input": StoredColumn(column=self.column)}

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return {pool: parts_of(pool, len(scenes), PART_ROWS) for pool, scenes in self.scenes.items()}

    def traits(self, part: Part) -> Traits:
        """See Source."""
        return Traits()

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        pool, first, end = part.what
        chosen = self.scenes[pool][first:end]
        fields = {name: np.concatenate([getattr(scene, name) for scene in chosen]) for name in StoredScene._fields}
        return {"input": Ragged.of(fields, [len(scene.objects) for scene in chosen])}
