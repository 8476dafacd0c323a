"""Class weights: how much a row of each class counts in the loss."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, NonNegativeFloat
from torch import Tensor

from nn_models.columns import Label
from nn_models.errors import UserError, did_you_mean

FIELD = "objective.class_weights"


def _name(key: Any) -> Any:
    """A class's name as text: YAML takes 3 and true for other things."""
    if isinstance(key, bool):
        return str(key).lower()
    return str(key) if isinstance(key, int) else key


ClassWeights = Literal["balanced"] | dict[Annotated[str, BeforeValidator(_name)], NonNegativeFloat]


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
