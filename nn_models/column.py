"""Column: what all kinds of columns have in common."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from nn_models.errors import UserError
from nn_models.spec import Spec

if TYPE_CHECKING:  # models need torch, descriptions do not
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from nn_models.batch import Value

Layout = Literal["dense", "ragged"]


class RaggedField(NamedTuple):
    """One of the arrays that a ragged column is stored as: (elements, *shape)."""

    dtype: str
    shape: tuple[int, ...] = ()


class Column(Spec):
    """Base of the kinds of columns: a named, typed part of every row."""

    noun: ClassVar[str]  # as errors call one value of it
    scaled: ClassVar[bool] = False  # numbers, which models ask for at a scale; predicted ones are standardised
    predicted: ClassVar[bool] = False  # one for a row, only ever to be predicted
    kind: str

    @property
    def layout(self) -> Layout:
        """How it is stored, the only thing that storage asks: every row of one shape, or rows of elements."""
        return "dense"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one row where they are all of one shape; of one element where they are not."""
        raise NotImplementedError

    @property
    def extent(self) -> str:
        """What tells it from others of its kind: `1 x 28 x 28`, `over 18,280 words`."""
        return " x ".join(map(str, self.row_shape))

    @property
    def num_outputs(self) -> int:
        """Outputs of a model that predicts one of it. Raises UserError where nothing predicts such a column."""
        raise UserError("data", f"{self.noun} is nothing to predict", "choose a label or numbers as the target")

    @property
    def labels_of(self) -> str | None:
        """The column whose elements it labels, one by one; None where it stands alone."""
        return None

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that a model can tell from each other, in the order of their vectors; none where it reads no words.

        Where they have no names, or what is counted is no word, there are none either.
        """
        return ()

    @property
    def learned_names(self) -> tuple[str, ...]:
        """What a model tells from each other by number: words of its vocabulary, else classes; none where unnamed."""
        names: tuple[str, ...] = getattr(self, "names", ())
        return self.vocabulary or names

    @property
    def learned_extent(self) -> str:
        """For people: what a model has learned to read of it, which must be the same of other data for it."""
        return self.describe()

    def unknown_words(self, values: "NDArray[Any]") -> "NDArray[np.bool_] | None":
        """Of stored words (n,), which are not in the vocabulary; None where none can be."""
        return None

    def ragged_fields(self) -> Mapping[str, RaggedField]:
        """The arrays that a ragged column is stored as, by name."""
        return {}

    def lay(self, fields: Mapping[str, "Tensor"], lengths: "Tensor", longest: int) -> "Value":
        """The stored elements of some rows, one row after the other, as models are given them."""
        from nn_models.batch import Ragged

        (values,) = fields.values()
        return Ragged(values, lengths, longest)

    def imagine(self, rows: int) -> "Value":
        """Some rows to rehearse with, on the device that is current; the meta device will do."""
        raise NotImplementedError

    def describe(self) -> str:
        """For people: `image 1 x 28 x 28`."""
        return f"{self.kind} {self.extent}".strip()
