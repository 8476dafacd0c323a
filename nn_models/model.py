"""ModelSpec: the base of every model's description: what it reads, at which scale, what it gives."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nn_models.columns import Column, Features, Image, Scale
from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.spec import Spec

if TYPE_CHECKING:  # descriptions need no torch
    from torch import Tensor, nn

    from nn_models.batch import Batch
    from nn_models.word_vectors import WantedVectors

# What a model makes of the rows: a row of outputs each, one for each element, the input again, a distribution of codes
# and of the input again, a tree over its words, with labels or without, one over its segments, or it has two halves.
# One that can do several follows the rows' target: outputs for each element where elements have labels, else a row.
Gives = Literal["row", "elements", "reconstruction", "posterior", "tree", "labelled_tree", "joins", "halves"]

# How fused trials compute it: by layers that are as many times as wide, or by vmap.
Batching = Literal["wide", "vmap"]

Reads = Mapping[str, tuple[type[Column], ...]]  # a column's name -> the kinds of it that will do


def reading(**kinds: type[Column] | tuple[type[Column], ...]) -> Reads:
    """What a model or an objective reads: `reading(input=(Features, Image), target=Label)`."""
    return MappingProxyType({name: kind if isinstance(kind, tuple) else (kind,) for name, kind in kinds.items()})


class ModelSpec(Spec):
    """Base of every model's description."""

    reads: ClassVar[Reads] = reading(input=(Features, Image))
    gives: ClassVar[frozenset[Gives]] = frozenset({"row"})
    # whether the module makes codes of rows and rows of codes: it has `encode` and `decode` (CodingNet)
    codes: ClassVar[bool] = False
    # the parts of the report that show what is inside of it, beside those of what its objective's test has found
    sections: ClassVar[tuple[str, ...]] = ("filters",)
    # fields that are paths of the user's files, whose numbers its weights begin with: see `wanted_vectors`
    files: ClassVar[tuple[str, ...]] = ()
    kind: str

    @property
    def scale(self) -> Scale:
        """Of the numbers it reads; an objective may ask for another."""
        return "standard"

    @property
    def batches(self) -> Batching | None:
        """How fused trials compute it; None: not at all."""
        return None

    @property
    def sees_ahead(self) -> bool:
        """Whether what it gives for an element depends on elements that follow it."""
        return False

    def check(self, signature: Signature) -> None:
        """Raise UserError where the model cannot read such rows."""
        for name, kinds in self.reads.items():
            check_column(
                signature,
                name,
                kinds,
                path="model.kind",
                reads=f"{self.kind} reads {' or '.join(sorted(_kind(kind) for kind in kinds))} {name}",
                fix="choose another model or data set",
            )

    @abstractmethod
    def build(self, signature: Signature) -> "nn.Module":
        """The module, freshly initialised from torch's global generator."""

    def inspect(self, model: "nn.Module", signature: Signature, batch: "Batch") -> Mapping[str, "Tensor"]:
        """What its `sections` of the report show, by `SECTION/NAME`, on the CPU: of the trained module, on a few rows.

        It changes nothing of the module, draws nothing from the global generators, and takes a few seconds at most.
        """
        return {}

    def wanted_vectors(self, signature: Signature) -> "WantedVectors | None":
        """What the weights of a new model begin with beside what is drawn; None for nothing.

        Models read no files: whoever trains one does, and hands what is found to `take_vectors`. A trained one needs
        none of it.
        """
        return None

    def take_vectors(self, model: Any, words: "Tensor", vectors: "Tensor") -> None:
        """Let a new module's rows of these words, (n,), be these vectors, (n, size)."""
        raise NotImplementedError

    def quicker_fused(self, signature: Signature, num_rows: int) -> bool:
        """Whether fused trials are quicker on a CPU than one after the other, with batches of so many rows.

        False also where that was not measured: such models are fused only where that is asked for. The figures stand
        in `cluster.tuning.fused.groups.pays`.
        """
        return False

    def settings(self) -> dict[str, Any]:
        """All fields but the kind, as the module's constructor takes them."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}


def check_column(
    signature: Signature, name: str, kinds: tuple[type[Column], ...], *, path: str, reads: str, fix: str
) -> None:
    """Raise UserError where the rows have no such column, or one of another kind. `reads` says who wants what."""
    if name not in signature:
        raise UserError(path, f"{reads}, but the data has no {name}", fix)
    column = signature[name]
    if not isinstance(column, kinds):
        raise UserError(path, f"{reads}, but the data has {column.kind} {name} {_extent(column)}", fix)


def _extent(column: Column) -> str:
    return f"of shape {column.row_shape}" if column.layout == "dense" and column.row_shape else column.extent


def _kind(column: type[Column]) -> str:
    return str(column.model_fields["kind"].default)
