"""Class weights: how much a row of each class counts in the loss."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, NonNegativeFloat
from torch import Tensor

from nn_models.columns import Label
from nn_models.errors import UserError, did_you_mean
from nn_models.spec import invalid

FIELD = "objective.class_weights"


def _weights(wanted: Any) -> Any:
    """As it is kept: names of classes are text, though YAML takes 3 and true for other things."""
    if wanted is None or wanted == "balanced":
        return wanted
    if not isinstance(wanted, Mapping):
        raise invalid(f"must be balanced, or a weight by the name of a class, not {wanted!r}", "write {rare: 10}")
    found = {str(name).lower() if isinstance(name, bool) else str(name): weight for name, weight in wanted.items()}
    for name, weight in found.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 <= weight < math.inf):
            raise invalid(f"must be a number from 0, not {weight!r}", field=name)
    return found


ClassWeights = Annotated[Literal["balanced"] | dict[str, NonNegativeFloat] | None, BeforeValidator(_weights)]


def weights_of(wanted: Literal["balanced"] | Mapping[str, float], label: Label) -> Tensor:
    """(C,), float32 on the CPU: the weight of each class, such that training rows weigh 1 on average.

        balanced: w_c = n / (C n_c)        given: w_c = g_c n / sum_k n_k g_k        (n_c of n training rows; g is 1
        for classes that are not given)

    So the learning rate means what it means without weights, and sums over rows are divided by their number.
    Raises UserError for names that no class has, and where the classes' numbers of rows are not known.
    """
    names = label.names or tuple(map(str, range(label.size)))
    if not label.counts.get("train"):
        raise UserError(
            FIELD,
            "how many training rows each class has is not known: the data was prepared by an earlier version",
            "prepare it again, or leave this out",
        )
    rows = torch.tensor(label.counts["train"], dtype=torch.float64, device="cpu")
    if isinstance(wanted, str):
        there = rows > 0
        return torch.where(there, rows.sum() / (there.sum() * rows.clamp(min=1)), 1.0).float()
    for name in wanted:
        if name not in names:
            raise UserError(f"{FIELD}.{name}", "no class has this name", did_you_mean(name, names))
    given = torch.tensor([wanted.get(name, 1.0) for name in names], dtype=torch.float64, device="cpu")
    mean = (rows * given).sum() / rows.sum()
    if not mean:
        raise UserError(FIELD, "no training row would count", "give a class that has some a weight above 0")
    return (given / mean).float()
