"""What there is to see inside of an autoencoder on a few rows: what moving along one number of a code does.

Shapes: B rows of the batch, K numbers of a code, S steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nn_models.batch import Batch
from nn_models.columns import Image
from nn_models.reconstruction_evidence import as_stored
from nn_models.signature import Signature

MOST_UNITS = 10  # of a code that are moved: those that differ the most between rows
STEPS = 11
REACH = 2.0  # standard deviations either way


@torch.no_grad()
def traversals(
    model: Any, again: Callable[[Tensor], Tensor], signature: Signature, batch: Batch, **told: Tensor
) -> dict[str, Tensor]:
    """`codes/traversals` (units, S, *shape) as the files hold rows, `codes/units` (units,): their places in the code.

    The first row's code, in which one number at a time goes from -REACH to REACH standard deviations about the mean of
    the batch's codes. `again` makes rows of what the decoder gives. Nothing of rows that are no pictures.
    """
    if not isinstance(signature["input"], Image) or not hasattr(model, "encode"):
        return {}
    codes = model.encode(batch["input"], **told).float()
    if len(codes) < 2:
        return {}
    mean, deviation = codes.mean(0), codes.std(0)
    units = deviation.argsort(descending=True)[:MOST_UNITS].sort().values
    steps = torch.linspace(-REACH, REACH, STEPS, device=codes.device)
    moved = codes[:1].expand(len(units) * STEPS, -1).clone().unflatten(0, (len(units), STEPS))
    places = torch.arange(len(units), device=codes.device)
    moved[places, :, units] = mean[units, None] + deviation[units, None] * steps
    flat = moved.flatten(0, 1)
    one = {name: values[:1].expand(len(flat)) for name, values in told.items()}
    rows = as_stored(batch, again(model.decode(flat, **one).float()))
    return {"codes/traversals": rows.unflatten(0, (len(units), STEPS)).cpu().contiguous(), "codes/units": units.cpu()}
