"""Coder: an autoencoder's model as files meet it: rows to codes, codes to rows, and how far off rows come back."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from cluster.runs.predictor import MOST_NUMBERS, Predictor, class_number, pieces
from cluster.training.evaluation import autocast
from nn_models.batch import Batch
from nn_models.columns import Label
from nn_models.errors import UserError


class Coder(Predictor):
    """An autoencoder: `encode` makes codes of rows, `decode` rows of codes; called, it gives rows again.

    Rows are as a Predictor takes and gives them: in the units of the files. A net that is told of a class is given it
    as `target`, by name or number.
    """

    @property
    def num_codes(self) -> int:
        """Numbers of a row's code."""
        return int(cast(Any, self.recipe.model).code)

    @property
    def has_prior(self) -> bool:
        """Whether codes have a distribution, the standard normal one, from which rows may be drawn."""
        return "posterior" in self.recipe.model.gives

    @property
    def told(self) -> tuple[str, ...]:
        """The columns that the net is told of beside the row."""
        return self.reads[1:]

    @property
    def gives(self) -> str:
        """See OpenedModel."""
        column = self._column("input").column
        return (
            f"{column.kind} {column.extent}: the rows again; encode() {self.num_codes} numbers, decode() rows of them"
        )

    @torch.no_grad()
    def encode(self, input: Any, **columns: Any) -> Tensor:
        """Rows -> codes (rows, K), on its device; of a variational net the means of q(z | x)."""
        return self._each(self._codes, {"input": input, **columns})

    @torch.no_grad()
    def decode(self, codes: Any, **columns: Any) -> Tensor:
        """Codes (rows, K) -> rows, in the units of the files, not rounded. Raises UserError for what are no codes."""
        values = torch.as_tensor(codes, dtype=torch.float32)
        if values.dim() != 2 or values.shape[1] != self.num_codes:
            wanted = f"(rows, {self.num_codes})"
            raise UserError("codes", f"of shape {tuple(values.shape)}, where the model has {wanted}", "give such codes")
        if set(columns) != set(self.told):
            wanted = " and ".join(self.told) or "nothing"
            raise UserError("codes", f"given {', '.join(columns) or 'nothing'} beside them, and not {wanted}")
        return self._each(self._rows, {"codes": values, **columns})

    @torch.no_grad()
    def errors(self, input: Any, **columns: Any) -> Tensor:
        """Rows -> the squared error a number of each (rows,), at the scale that the net reads, on its device.

        Nothing is drawn and no noise is added: a variational net gives the mean of p(x | z), z the mean of q(z | x).
        """
        return self._each(self._errors, {"input": input, **columns})

    @torch.no_grad()
    def coded(self, input: Any, **columns: Any) -> tuple[Tensor, Tensor]:
        """The codes (rows, K) and the errors (rows,) of rows: see `encode` and `errors`."""
        return self.encode(input, **columns), self.errors(input, **columns)

    def drawn(self, num: int, *, label: str | int | None = None, seed: int = 0, path: str = "") -> Tensor:
        """Rows (num, *shape) of codes from the prior; of the classes in turn, or all of one, where it is told of them.

        The same seed draws the same. Raises UserError where there is no prior, or no such class.
        """
        if not self.has_prior:
            kind = self.recipe.model.kind
            raise UserError(
                self.recipe.name, f"codes of {kind} have no distribution to draw from", "give a vae's run, or rows"
            )
        most = MOST_NUMBERS // self.manifest.signature.input_size
        if not 1 <= num <= most:
            raise UserError(f"{path}num", f"{num} rows; from 1 to {most} can be made at once")
        codes = torch.randn(num, self.num_codes, generator=torch.Generator().manual_seed(seed))
        return self.decode(codes, **self.classes_told(num, label=label, path=path))

    def classes_told(self, num: int, *, label: str | int | None = None, path: str = "") -> dict[str, Tensor]:
        """What the net is to be told of so many rows: a class, or all in turn; nothing where it is told none."""
        if not self.told:
            if label is not None:
                kind = self.recipe.model.kind
                raise UserError(
                    f"{path}label", f"{kind} makes rows without labels", "leave it out, or train a conditional_vae"
                )
            return {}
        (name,) = self.told
        column = cast(Label, self._column(name).column)
        if label is None:
            return {name: torch.arange(num) % column.num_outputs}
        return {name: torch.full((num,), class_number(str(label), column.names, column.size, path=f"{path}label"))}

    # -- of so many rows as are computed at once -------------------------------------------------------------------

    def _each(self, compute: Callable[[Mapping[str, Any]], Tensor], rows: Mapping[str, Any]) -> Tensor:
        return torch.cat([compute(piece).float() for piece in pieces(rows)])

    def _codes(self, rows: Mapping[str, Any]) -> Tensor:
        batch = self.batch(rows)
        with autocast(self.recipe.train.precision, self.device):
            return cast(Any, self.net).encode(batch["input"], *self._beside(batch))

    def _errors(self, rows: Mapping[str, Any]) -> Tensor:
        batch = self.batch(rows)
        with autocast(self.recipe.train.precision, self.device):
            again = self.objective.outputs(self.net, batch)
        return (again.float() - batch["input"]).square().flatten(1).mean(1)

    def _rows(self, given: Mapping[str, Any]) -> Tensor:
        columns = {name: torch.as_tensor(given[name]).to(self.device) for name in self.told}
        with autocast(self.recipe.train.precision, self.device):
            decoded = cast(Any, self.net).decode(given["codes"].to(self.device), *columns.values())
        again = cast(Any, self.objective).again(decoded.float())
        return self.scaling.inverse("input", again)

    def _beside(self, batch: Batch) -> list[Any]:
        return [batch[name] for name in self.told]
