"""What every source is: a DataSpec that opens to a Source, whose parts are converted to shards one by one."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, PrivateAttr

from cluster.data.augment import AnyAugmentSpec
from cluster.data.layouts import Layout
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.split import Traits
from nn_models.columns import Column, Image, Label
from nn_models.errors import Problem, UserError
from nn_models.spec import Spec

UNLABELLED = ("all",)  # the one class of rows without labels

MOST_TOLD = 20  # bad rows that are told one by one

T = TypeVar("T")
R = TypeVar("R")

Fraction = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]  # of a side; more is a slip of the keyboard that would fill the memory


@dataclass(frozen=True)
class Part:
    """A piece of a source that is converted at once; `what` tells its source which piece, and can be pickled."""

    rows: int
    what: Any
    name: str = ""  # as errors call it: the file, and where in it


class Source(Protocol):
    """An opened source. It is pickled to the processes that convert its parts."""

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """What its rows hold, in the order in which it is stored; mean, std and elements are measured later."""

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """The parts of "train", and of "validation" and "test" where the source has such a split of its own."""

    def load(self, part: Part) -> Mapping[str, Layout]:
        """The part's rows of each of the columns. Raises BadRows, and UserError where that says nothing of others."""

    def traits(self, part: Part) -> Traits:
        """What decides on the split of the part's rows, read without the rest of them; nothing where any will do."""


class BadRows(UserError):
    """Rows that cannot be used, all those of a part: those of the other parts are looked for before it is told."""


def each(function: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """The function of every value. Raises BadRows with the problems of all values."""
    found: list[R] = []
    problems: list[Problem] = []
    for value in values:
        try:
            found.append(function(value))
        except BadRows as error:
            problems += error.problems
    if problems:
        raise BadRows.of(problems)
    return found


def bad_rows(problems: Iterable[Problem]) -> UserError:
    """One error for the bad rows of all parts: what one field mends is told once, and of too many the first."""
    told = list({problem.names or problem: problem for problem in reversed([*problems])}.values())[::-1]
    more = len(told) - MOST_TOLD
    rest = [Problem("data", f"{more:,} more such problems", "mend those too")] if more > 0 else []
    return UserError.of([*told[:MOST_TOLD], *rest])


class FileColumns(NamedTuple):
    """The columns of a file with rows such as these: of what is read, and of the label; images of any size or not.

    Of texts: whether spaces alone separate their words, and how many tokens are read of each at most.
    """

    input: tuple[str, ...]
    target: str | None = None
    resize: bool = False
    spaced: bool = False
    longest: int | None = None


class DataSpec(Spec):
    """Base of every data section: which rows, and how they are used in training."""

    # Fields about how rows are used; all others decide what is prepared.
    TRAINING_FIELDS: ClassVar[frozenset[str]] = frozenset({"augment", "shuffle_window", "bucket"})

    # "streams": rows are windows of one text, in its order, and a split is a stretch of it
    order: ClassVar[Literal["shuffled", "streams"]] = "shuffled"
    kind: str
    augment: tuple[AnyAugmentSpec, ...] = Field((), description="random changes to training images, in order")
    shuffle_window: PositiveInt | None = Field(
        None, description="rows shuffled together; all rows where the set is small enough to be held in memory"
    )
    bucket: PositiveInt | None = Field(
        None,
        description="global batches that share their rows anew, by length, so that little is padded; with 1 each keeps "
        "its own",
    )

    def identity(self) -> dict[str, Any]:
        """The fields that decide what is prepared."""
        return self.model_dump(mode="json", exclude=set(self.TRAINING_FIELDS))

    def resolved(self, base: str) -> "DataSpec":
        """The same data with paths made absolute against the directory `base`."""
        return self

    def fingerprint(self) -> str:
        """Changes when the source's content does; cheap. Raises UserError where the data is missing."""
        return ""

    def target_fix(self, kinds: tuple[type[Column], ...]) -> tuple[str, str] | None:
        """(field, fix): what to change here so that the target is of one of these kinds; None where nothing does it."""
        return None

    @property
    def prepared_at(self) -> str | None:
        """The folder of data that is prepared already; None for a source."""
        return None

    @property
    def file_columns(self) -> FileColumns | None:
        """Where a user's file has such rows, for a model that was trained on them; None where no file is like them."""
        return None

    def fitted_to(self, manifest: Manifest) -> "DataSpec":
        """The same data with what a model has learned to read, of whose data this is the manifest, as a vocabulary."""
        return self

    def learned(self, source: Source, training: Sequence[tuple[Part, NDArray[np.bool_]]]) -> Source:
        """The opened source with what it takes from training rows alone, as a vocabulary: those of parts by a mask."""
        return source

    def open(self) -> Source:
        """Find the data. Raises UserError, naming path and fix, where it is missing or unfit."""
        raise NotImplementedError


def _as_names(value: Any) -> Any:
    """One name, or several; classes may be called by numbers, which YAML reads as such."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in values]


class SplitSpec(DataSpec):
    """Base of the data sections whose validation split is drawn from the training rows."""

    validation_fraction: Fraction = Field(0.1, description="share of the training rows held out for validation")
    split_seed: NonNegativeInt = Field(0, description="seed of the split")
    stratify: bool = Field(True, description="take what is held out evenly from each class, where there are labels")
    anomaly: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = Field(
        (), description="classes that are no normal rows: all of theirs go to the test split, for manta detect"
    )

    def identity(self) -> dict[str, Any]:
        """See DataSpec: data without anomalies is what it was before there were any."""
        found = super().identity()
        return found if self.anomaly else {name: value for name, value in found.items() if name != "anomaly"}

    @property
    def held_out_for_test(self) -> float:
        """Share of the training rows that becomes the test split; 0 where the source has one of its own."""
        return 0.0


class DrawnTestSpec(SplitSpec):
    """Base of the data sections that may have no test split of their own."""

    test_fraction: Fraction = Field(0.1, description="share held out for test where the source has no test split")

    @property
    def held_out_for_test(self) -> float:
        """See SplitSpec."""
        return self.test_fraction


class OwnFilesSpec(DataSpec):
    """Base of the data sections of the user's files, where splits may stand apart."""

    path: str = Field(min_length=1, description="a file, or a folder of files, local or a URI")
    validation_path: str | None = Field(None, min_length=1, description="the validation split, where it stands apart")
    test_path: str | None = Field(None, min_length=1, description="the test split, where it stands apart")

    def found_at(self, path: str, *, field: str) -> Sequence[tuple[Any, ...]]:
        """The files at a path: of each what tells it from others, and last what storage says of it.

        `field` is where the recipe has the path. Raises UserError where there are none.
        """
        raise NotImplementedError

    @property
    def paths(self) -> dict[str, tuple[str, str]]:
        """Pool -> the field, and the path in it."""
        fields = {"train": "path", "validation": "validation_path", "test": "test_path"}
        return {pool: (name, path) for pool, name in fields.items() if (path := getattr(self, name))}

    @property
    def files(self) -> dict[str, Sequence[tuple[Any, ...]]]:
        """Pool -> its files."""
        return {pool: self.found_at(path, field=f"data.{field}") for pool, (field, path) in self.paths.items()}

    def resolved(self, base: str) -> DataSpec:
        """See DataSpec."""
        return self.model_copy(update={field: absolute(path, base) for field, path in self.paths.values()})

    def fingerprint(self) -> str:
        """See DataSpec."""
        found = [(*map(str, file), info.size, info.mtime_ns) for files in self.files.values() for *file, info in files]
        return hashlib.sha256(repr(found).encode()).hexdigest()


class FittedSpec(DataSpec):
    """Base of the data sections that number words and classes: of other data as a trained model has learned to."""

    # what a model was trained on, where this is other data for it
    _known: Manifest | None = PrivateAttr(None)

    def known(self, name: str) -> tuple[str, ...]:
        """The names in a column of what a model was trained on; none where there is no such model or column."""
        columns = self._known.signature.columns if self._known else {}
        return columns[name].learned_names if name in columns else ()

    def identity(self) -> dict[str, Any]:
        """See DataSpec."""
        if self._known is None:
            return super().identity()
        return {**super().identity(), "known": {name: self.known(name) for name in sorted(self._known.columns)}}

    def fits(self, manifest: Manifest) -> bool:
        """Whether a model that was trained on such data reads rows like these at all; else it refuses them itself."""
        raise NotImplementedError

    def fitted_to(self, manifest: Manifest) -> DataSpec:
        """See DataSpec: with the words and classes of the model."""
        if not self.fits(manifest):
            return self
        fitted = self.model_copy()
        fitted._known = manifest
        return fitted


def labels(names: tuple[str, ...]) -> StoredColumn:
    """The column of a class a row, by its names."""
    return StoredColumn(column=Label(names=names, size=len(names)), dtype="int64")


def pixels(shape: tuple[int, ...], *, moments: bool = True) -> StoredColumn:
    """The column of an image a row, (channels, height, width) bytes; with or without mean and std."""
    channels, height, width = shape
    image = Image(shape=(channels, height, width))
    # what is left at its default stays out of the manifest
    return StoredColumn(column=image, dtype="uint8", **({} if moments else {"moments": False}))


def absolute(path: str, base: str) -> str:
    """A local path made absolute against the directory `base`; a URI as it is."""
    return path if "://" in path else str(Path(base, Path(path).expanduser()).absolute())


def even_parts(rows: int, part_rows: int) -> list[Part]:
    """Parts of `part_rows` rows each, `what` being (first, past-the-last)."""
    return [
        Part(min(part_rows, rows - first), (first, min(first + part_rows, rows))) for first in range(0, rows, part_rows)
    ]


def parts_of(pool: str, rows: int, part_rows: int) -> list[Part]:
    """The same of a pool, `what` being (pool, first, past-the-last)."""
    return [Part(part.rows, (pool, *part.what)) for part in even_parts(rows, part_rows)]
