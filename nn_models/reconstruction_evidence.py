"""Evidence of autoencoders: codes and errors of all test rows, and some rows beside what became of them.

Shapes: N rows of the test, B rows of a batch, K numbers of a code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nn_models.batch import Batch
from nn_models.examples import Examples, Gather, gather_here
from nn_models.figures import Gathered

MOST_CODES = 1 << 24  # numbers (64 MiB) of the codes of all rows; of more the first ones of each code are kept


class ReconstructionEvidence:
    """What a test of an autoencoder leaves, in the order of the split, by name:

    `codes` (N, K) float32, `errors` (N,) float32, the squared error a number of each row, and `labels` (N,) int64 where
    rows have labels. `example_inputs`, `example_again` and, where the net was given something else than the row,
    `example_given` are as the files hold rows: the first rows, then those of the largest errors, `example_errors` of
    both.
    """

    section = "reconstructions"

    def __init__(self) -> None:
        self._examples = Examples(2)
        self._rows = Gathered()
        self._labelled = False

    def add(self, batch: Batch, outputs: Any) -> None:
        """See Evidence: outputs with `again`, `codes` and `given`."""
        errors = (outputs.again - batch["input"]).square().flatten(1).mean(1)
        labels = batch.columns.get("target")
        self._labelled = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() == 1
        kept = [errors[:, None].double(), outputs.codes.flatten(1).double()]
        if self._labelled and isinstance(labels, Tensor):
            kept.append(labels[:, None].double())
        self._rows.add(batch, torch.cat(kept, 1))
        stored = batch.stored["input"]
        columns = {"inputs": stored, "again": as_stored(batch, outputs.again), "errors": errors.float()}
        if outputs.given is not None:
            columns["given"] = as_stored(batch, outputs.given)
        self._examples.keep(0, batch.place.ids, torch.zeros(len(errors), device=errors.device), columns)
        self._examples.keep(1, batch.place.ids, errors, columns)

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence."""
        labelled = bool(across(torch.tensor(float(self._labelled), device=device)))
        rows = self._rows.whole(across, device).cpu()
        codes = rows[:, 1:-1] if labelled else rows[:, 1:]
        most = max(MOST_CODES // max(len(rows), 1), 1)
        whole = {"errors": rows[:, 0].float().contiguous(), "codes": codes[:, :most].float().contiguous()}
        if labelled:
            whole["labels"] = rows[:, -1].long()
        return {**whole, **self._examples.tensors(gather, device)}


def as_stored(batch: Batch, values: Tensor) -> Tensor:
    """Rows of the input's scale as the files hold them: bytes where these are bytes."""
    found, stored = batch.unscale("input", values.float()), batch.stored["input"]
    if isinstance(stored, Tensor) and stored.dtype == torch.uint8:
        return found.round().clamp(0, 255).to(torch.uint8)
    return found
