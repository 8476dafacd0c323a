"""The kinds of columns that models know: images, labels, tokens, trees, scenes …; a closed union, as models are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from nn_models.column import Column as Column
from nn_models.column import Layout as Layout
from nn_models.column import RaggedField as RaggedField
from nn_models.spec import Spec, invalid

if TYPE_CHECKING:  # models need torch, descriptions do not
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from nn_models.batch import Value

# How numbers are given to a model: (x - mean) / std of the training rows; bytes as 0 to 1, other numbers as they are;
# -1 to 1 (images; other numbers as "standard"); bytes as 0 to 1, other numbers as "standard"; bytes as 0 to 1, and
# nothing else: what is no byte may lie anywhere.
Scale = Literal["standard", "unit", "symmetric", "pixels", "bounded"]
TextUnit = Literal["characters", "bytes", "words"]
UNKNOWN = "<unknown>"  # the name of what is not in the vocabulary
Unknown = dict[str, tuple[NonNegativeInt, NonNegativeInt]]
UNKNOWN_WORDS: Any = Field({}, description="of each split words that are not in the vocabulary, and all, where known")
IMAGINED_LENGTH = 3  # elements of a row to rehearse with, where rows differ in length


class Features(Column):
    """A vector of numbers, float32 (size,)."""

    noun = "features"
    scaled = True
    kind: Literal["features"] = "features"
    size: PositiveInt

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See Column."""
        return (self.size,)

    def imagine(self, rows: int) -> "Tensor":
        """See Column."""
        return _zeros(rows, self.size)


class Image(Column):
    """An image, (channels, height, width): bytes, or float32."""

    noun = "an image"
    scaled = True
    kind: Literal["image"] = "image"
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See Column."""
        return self.shape

    def imagine(self, rows: int) -> "Tensor":
        """See Column."""
        return _zeros(rows, *self.shape)


class Ahead(Spec):
    """What numbers to predict are of a series: the next steps of some of its columns, step after step."""

    steps: PositiveInt = Field(description="how far ahead: the horizon")
    columns: tuple[str, ...] = Field(min_length=1, description="of a step that is read, those to forecast first")
    targets: PositiveInt = Field(description="how many of the columns are forecast")
    changes: tuple[NonNegativeFloat, ...] = Field(
        description="of each of these: the mean size of a change over a season (without one over a step) in training"
    )
    season: PositiveInt | None = Field(None, description="steps after which the series does much the same again")
    relative: bool = Field(False, description="both are differences to the last step that is read")
    time: str | None = Field(None, description="the file's column of times")
    group: str | None = Field(None, description="the file's column that says which series a row belongs to")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are forecast."""
        return self.columns[: self.targets]


class Numbers(Column):
    """Numbers to predict, float32 (size,)."""

    noun = "a number"
    scaled = True
    predicted = True
    kind: Literal["numbers"] = "numbers"
    size: PositiveInt
    ahead: Ahead | None = Field(None, description="of a series: which of its steps and columns they are")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See Column."""
        return (self.size,)

    @property
    def num_outputs(self) -> int:
        """See Column."""
        return self.size

    def imagine(self, rows: int) -> "Tensor":
        """See Column."""
        return _zeros(rows, self.size)


class _Named(Column):
    """What is one of `size` names, counted from 0; the names may be left out where nobody needs them."""

    names: tuple[str, ...] = ()
    size: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(names := data.get("names"), (list, tuple)) or not names:
            return data
        if data.get("size", len(names)) != len(names):
            raise invalid(f"{data['size']} where there are {len(names)} names", field="size")
        return {**data, "size": len(names)}


class Label(_Named):
    """One of several classes, int64 ()."""

    noun = "a label"
    predicted = True
    kind: Literal["label"] = "label"
    counts: dict[str, tuple[NonNegativeInt, ...]] = Field(
        {}, description="rows of each class in each split, where that is known"
    )

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See Column."""
        return ()

    @property
    def extent(self) -> str:
        """See Column."""
        return f"of {self.size:,} class{'es' * (self.size != 1)}"

    @property
    def num_outputs(self) -> int:
        """See Column."""
        return self.size

    def imagine(self, rows: int) -> "Tensor":
        """See Column."""
        return _zeros(rows, dtype="int64")


class _Elements(Column):
    """Base of the kinds whose rows are sequences of elements: of one `length`, or each of its own."""

    length: PositiveInt | None = None
    dtype: ClassVar[str]

    @property
    def element_shape(self) -> tuple[int, ...]:
        """Of one element."""
        return ()

    @property
    def layout(self) -> Layout:
        """See Column."""
        return "ragged" if self.length is None else "dense"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See Column."""
        return self.element_shape if self.length is None else (self.length, *self.element_shape)

    def ragged_fields(self) -> Mapping[str, RaggedField]:
        """See Column."""
        return {"values": RaggedField(self.dtype, self.element_shape)}

    def imagine(self, rows: int) -> "Value":
        """See Column."""
        if self.length is not None:
            return _zeros(rows, *self.row_shape, dtype=self.dtype)
        import torch

        values = _zeros(rows * IMAGINED_LENGTH, *self.element_shape, dtype=self.dtype)
        lengths = torch.full((rows,), IMAGINED_LENGTH, device="cpu")  # known there too, as in batches of real rows
        return self.lay({"values": values}, lengths, IMAGINED_LENGTH).to(torch.get_default_device())


class Sequence(_Elements):
    """A sequence of vectors, float32 (length, width)."""

    noun = "a sequence"
    scaled = True
    dtype = "float32"
    kind: Literal["sequence"] = "sequence"
    width: PositiveInt

    @property
    def element_shape(self) -> tuple[int, ...]:
        """See _Elements."""
        return (self.width,)

    @property
    def extent(self) -> str:
        """See Column."""
        return f"of {self.length or 'any number of'} x {self.width}"


class Tokens(_Elements, _Named):
    """A text as numbers of words, or of characters, int32 (length,)."""

    noun = "tokens"
    dtype = "int32"
    kind: Literal["tokens"] = "tokens"
    unit: TextUnit | None = Field(None, description="what a token of a text is")
    unknown: Unknown = UNKNOWN_WORDS

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """See Column."""
        return self.names

    def unknown_words(self, values: "NDArray[Any]") -> "NDArray[np.bool_] | None":
        """See Column."""
        return None if (token := self.unknown_token) is None else values == token

    @property
    def unknown_token(self) -> int | None:
        """The number of what is not in the vocabulary; None where there is no such token."""
        return self.names.index(UNKNOWN) if UNKNOWN in self.names else None

    @property
    def extent(self) -> str:
        """See Column."""
        return f"{self.length} " * bool(self.length) + f"over {self.size:,} words"

    @property
    def num_outputs(self) -> int:
        """See Column: of each token."""
        return self.size


class Labels(_Elements, _Named):
    """A label of each element of another column, int32."""

    noun = "labels"
    dtype = "int32"
    kind: Literal["labels"] = "labels"
    of: str = Field("input", description="the column whose elements they label")

    @property
    def extent(self) -> str:
        """See Column."""
        return f"of {self.size:,} classes, one an element of {self.of}"

    @property
    def labels_of(self) -> str:
        """See Column."""
        return self.of

    @property
    def num_outputs(self) -> int:
        """See Column: of each element."""
        return self.size


class Tree(_Named):
    """A tree whose leaves are words: nodes in an order in which children come before parents, so the root last.

    Each node has a word (-1 for none), the places of its children (-1 for none) and its level, 1 more than the highest
    of its children's; leaves have 0. Words after the `known` ones, rare or new in training, have one vector together.
    """

    noun = "a tree"
    kind: Literal["tree"] = "tree"
    arity: PositiveInt = Field(2, description="children of a node at most")
    known: PositiveInt | None = Field(None, description="how many words have a vector of their own, the first ones")
    words_at: Literal["leaves", "nodes"] = Field("leaves", description="which nodes have words")
    unknown: Unknown = UNKNOWN_WORDS

    @property
    def num_known(self) -> int:
        """Words that have a vector of their own; all others have one together."""
        return self.size if self.known is None else self.known

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """See Column."""
        return self.names[: self.num_known]

    def unknown_words(self, values: "NDArray[Any]") -> "NDArray[np.bool_] | None":
        """See Column."""
        return None if self.num_known == self.size else values >= self.num_known

    @property
    def learned_extent(self) -> str:
        """See Column: trees of other words have all those in one vector, whatever they are and how many."""
        return f"{self.kind} over {self.num_known:,} words"

    @property
    def layout(self) -> Layout:
        """See Column."""
        return "ragged"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See Column."""
        return ()

    @property
    def extent(self) -> str:
        """See Column."""
        return f"over {self.size:,} words"

    def ragged_fields(self) -> Mapping[str, RaggedField]:
        """See Column."""
        children = RaggedField("int32", (self.arity,))
        return {"words": RaggedField("int32"), "children": children, "level": RaggedField("int32")}

    def lay(self, fields: Mapping[str, "Tensor"], lengths: "Tensor", longest: int) -> "Value":
        """See Column."""
        from nn_models.batch import Forest

        return Forest.of(fields["words"], fields["children"], fields["level"], lengths)

    def imagine(self, rows: int) -> "Value":
        """See Column: trees of a root over two leaves, or over one node after the other where it has one child."""
        import torch

        with torch.device("cpu"):  # where they can be laid together
            none = [-1] * self.arity
            root, level = ([0, 1, *none[2:]], [0, 0, 1]) if self.arity > 1 else ([1], [0, 1, 2])
            children = [none, none if self.arity > 1 else [0], root]
            words = [0 if height == 0 or self.words_at == "nodes" else -1 for height in level]
            fields: dict[str, list[Any]] = {"words": words, "children": children, "level": level}
            laid = {name: torch.tensor(values * rows, dtype=torch.int32) for name, values in fields.items()}
            forest = self.lay(laid, torch.full((rows,), len(level)), len(level))
        return forest.to(torch.get_default_device())


class Scene(Column):
    """A picture as a graph of segments: each has features, its neighbours, and the class of the object that it is of.

    Neighbours are places in the scene, -1 for none; it is enough that one of two names the other.
    """

    noun = "a scene"
    kind: Literal["scene"] = "scene"
    width: PositiveInt = Field(description="numbers of each segment")
    degree: PositiveInt = Field(description="neighbours of a segment at most")
    names: tuple[str, ...] = Field(min_length=1, description="the classes of objects")

    @property
    def layout(self) -> Layout:
        """See Column."""
        return "ragged"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See Column."""
        return (self.width,)

    @property
    def extent(self) -> str:
        """See Column."""
        return f"of segments of {self.width} numbers, {len(self.names):,} classes"

    @property
    def learned_names(self) -> tuple[str, ...]:
        """See Column: classes only tell the objects of one scene apart."""
        return ()

    @property
    def learned_extent(self) -> str:
        """See Column."""
        return f"{self.kind} of segments of {self.width} numbers"

    def ragged_fields(self) -> Mapping[str, RaggedField]:
        """See Column."""
        neighbours = RaggedField("int32", (self.degree,))
        features = RaggedField("float32", (self.width,))
        return {"features": features, "neighbours": neighbours, "objects": RaggedField("int32")}

    def lay(self, fields: Mapping[str, "Tensor"], lengths: "Tensor", longest: int) -> "Value":
        """See Column. Raises UserError where a neighbour is not there."""
        from nn_models.batch import Scenes

        return Scenes.of(fields["features"], fields["neighbours"], fields["objects"], lengths, longest)

    def imagine(self, rows: int) -> "Value":
        """See Column: chains of three segments, the first two of one class."""
        import torch

        with torch.device("cpu"):  # where they can be laid together
            neighbours = torch.full((rows * 3, self.degree), -1, dtype=torch.int32)
            neighbours[:, 0] = torch.tensor([1, 2, -1]).repeat(rows)
            features = torch.linspace(-1, 1, rows * 3 * self.width).view(-1, self.width)
            objects = torch.tensor([0, 0, min(1, len(self.names) - 1)], dtype=torch.int32).repeat(rows)
            fields = {"features": features, "neighbours": neighbours, "objects": objects}
            scenes = self.lay(fields, torch.full((rows,), 3), 3)
        return scenes.to(torch.get_default_device())


AnyColumn = Annotated[
    Features | Image | Numbers | Label | Sequence | Tokens | Labels | Tree | Scene, Field(discriminator="kind")
]


def _zeros(*shape: int, dtype: str = "float32") -> "Tensor":
    import torch

    return torch.zeros(shape, dtype=getattr(torch, dtype))
