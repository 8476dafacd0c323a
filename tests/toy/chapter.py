"""A chapter that uses everything at once: a ragged column, counted elements, carried state, a sum over ranks.

Nothing in the loop, the loader, shards, order, Ray Train or the actors knows of it: it is this file, the recipe in it,
and the lists in ToyRecipe.

Shapes: B rows of the batch, N tokens of them, T of the longest row, E and H units, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.data.layouts import Layout, Ragged
from cluster.data.manifest import StoredColumn
from cluster.data.sources.base import Part, SplitSpec, even_parts
from cluster.data.sources.images import DigitsSpec
from cluster.data.split import Traits
from cluster.recipe.recipe import Recipe
from nn_models import batch as batches
from nn_models.batch import Batch
from nn_models.classification import ClassificationSpec
from nn_models.columns import Labels, Tokens
from nn_models.feedforward import MLPSpec
from nn_models.metrics import Metric
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across, Measured, Objective, SupervisedSpec, only_here
from nn_models.signature import Signature

WORDS, CLASSES = 11, 3


class ToyNet(nn.Module):
    """A plain recurrent net (Elman 1990): h_t = tanh(E[x_t] + U h_(t-1)), and scores of each token from h_t."""

    def __init__(self, num_words: int, num_classes: int, *, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, width)
        self.recurrent = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, num_classes)

    def forward(self, tokens: batches.Ragged, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and the state (B, H) -> scores (N, C), hidden (N, H), and the state after each row's end (B, H)."""
        padded, mask = tokens.padded(), tokens.mask()
        h = self.embedding.weight.new_zeros(len(padded), self.recurrent.in_features) if state is None else state
        seen = []
        for t in range(tokens.longest):
            new = torch.tanh(self.embedding(padded[:, t]) + self.recurrent(h))
            h = torch.where(mask[:, t, None], new, h)
            seen.append(h)
        hidden = torch.stack(seen, 1).flatten(0, 1)[tokens.places()]
        return self.output(hidden), hidden, h


class ToyNetSpec(ModelSpec):
    """Reads tokens, and gives scores of each."""

    reads = reading(input=Tokens)
    gives = frozenset({"elements"})
    kind: Literal["toy_net"] = "toy_net"
    width: PositiveInt = 6

    def build(self, signature: Signature) -> ToyNet:
        """The module."""
        return ToyNet(signature["input"].num_outputs, signature["target"].num_outputs, **self.settings())


class ToyObjective(Objective):
    """Cross entropy of each token's class, and a penalty on the mean activation of the whole global batch.

    With the mean m = (1 / N) sum h over all N tokens of all ranks and their units, the penalty is m^2, once a batch.
    """

    metrics = (Metric("token_accuracy", "more"), Metric("first_accuracy", "more"))
    best = "token_accuracy"

    def __init__(self, *, penalty: float) -> None:
        self.penalty = penalty

    def measure(self, model: Any, batch: Batch, *, carry: Any = None, across: Across = only_here) -> Measured:
        """The loss counts tokens; `first_accuracy` counts rows, by their first token."""
        tokens, place = batch["input"], batch.place
        scores, hidden, state = model(tokens, carry)
        labels = batch["target"].values.long()
        loss = F.cross_entropy(scores, labels, reduction="sum")
        total = hidden.mean(1).sum() * bool(place.num_rows)  # a row that stands in is none of the batch's
        mean = across(total.detach()) / max(place.global_weight, 1)
        # the batch's penalty, a part for each of its tokens; its gradient is that of the tokens that are here
        value = mean.square() * place.weight
        slope = 2 * mean * (total - total.detach())
        right = (scores.detach().argmax(1) == labels).double()
        firsts = right[tokens.lengths.cumsum(0) - tokens.lengths]
        return Measured(
            loss + self.penalty * (value + slope),
            torch.stack((right.sum(), firsts.sum())),
            counts=torch.tensor([len(right), len(firsts)], dtype=torch.float64, device=right.device),
            carry=state.detach(),
        )


class ToyObjectiveSpec(SupervisedSpec):
    """The objective of the toy chapter."""

    reads = reading(target=Labels)
    takes = frozenset({"elements"})
    counts = "input"
    objective = ToyObjective
    kind: Literal["toy_objective"] = "toy_objective"
    penalty: float = 0.5

    def build(self, signature: Signature) -> ToyObjective:
        """The objective."""
        return ToyObjective(penalty=self.penalty)


class ToyTextSpec(SplitSpec):
    """Windows of a made text, of 1 to 6 tokens; a token's class depends on all before it, in other windows too."""

    order: ClassVar[Literal["shuffled", "streams"]] = "streams"
    kind: Literal["toy_text"] = "toy_text"
    rows: PositiveInt = 90

    def open(self) -> "ToyText":
        """See DataSpec."""
        return ToyText(self.rows)


@dataclass(frozen=True)
class ToyText:
    """See ToyTextSpec."""

    rows: int

    @property
    def columns(self) -> Mapping[str, StoredColumn]:
        """See Source."""
        return {
            "input": StoredColumn(column=Tokens(size=WORDS)),
            "target": StoredColumn(column=Labels(size=CLASSES)),
        }

    @property
    def pools(self) -> Mapping[str, list[Part]]:
        """See Source."""
        return {"train": even_parts(self.rows, 40)}

    def load(self, part: Part) -> Mapping[str, Layout]:
        """See Source."""
        generator = np.random.default_rng(0)
        lengths = generator.integers(1, 7, self.rows)
        text = generator.integers(0, WORDS, lengths.sum()).astype(np.int32)
        classes = (np.cumsum(text) % CLASSES).astype(np.int32)
        rows = slice(*part.what)
        return {
            "input": Ragged.of({"values": text}, lengths).take(rows),
            "target": Ragged.of({"values": classes}, lengths).take(rows),
        }

    def traits(self, part: Part) -> Traits:
        """See Source."""
        return Traits()


class ToyRecipe(Recipe):
    """A recipe whose lists have the toy chapter: what `zoo.py` and `catalogue.py` have of others."""

    model: Annotated[ToyNetSpec | MLPSpec, Field(discriminator="kind")]  # type: ignore[assignment]
    data: Annotated[ToyTextSpec | DigitsSpec, Field(discriminator="kind")]  # type: ignore[assignment]
    objective: Annotated[ToyObjectiveSpec | ClassificationSpec, Field(discriminator="kind")]  # type: ignore[assignment]


TOY: dict[str, Any] = {
    "name": "toy",
    "model": {"kind": "toy_net"},
    "data": {"kind": "toy_text", "validation_fraction": 0.2},
    "objective": {"kind": "toy_objective"},
    "optimizer": {"kind": "sgd", "lr": 0.5, "momentum": 0.5},
    "train": {"epochs": 3, "global_batch_size": 8, "log_every_steps": 1},
}
