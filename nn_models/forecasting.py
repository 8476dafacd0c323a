"""Forecast: the next steps of a series, beside the forecasts that need no net, with its errors in the series' units.

Shapes: B rows of the batch, T steps that are read, D numbers of a step, H steps ahead, K columns that are forecast, the
first of the D. Outputs are (B, H * K), step after step.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from nn_models.batch import Batch
from nn_models.columns import Ahead, Numbers, Sequence
from nn_models.errors import UserError
from nn_models.examples import Examples, Gather, gather_here
from nn_models.figures import Gathered
from nn_models.metrics import Metric
from nn_models.model import ModelSpec, reading
from nn_models.objectives import Across
from nn_models.regression import MOST_FEATURES, LeastSquares, PredictsNumbers, Regression
from nn_models.signature import Signature

NUM_EXAMPLES = 6
SPREAD, AMONG = 2_654_435_761, 1 << 32  # Knuth's multiplicative hash: examples come from all over the split
SIMPLE = {
    "naive": "always the last value",
    "seasonal": "the value a season before",
    "linear": "linear autoregression",
    "mean": "always the mean",
}
MASE = Metric("mase", "less", words="mean absolute scaled error", short="MASE")


def steps_back(steps: int, season: int) -> list[int]:
    """For each of the steps ahead the place, counted from the end of what is read, of the newest step one or more
    seasons before it: -1 for all of them where a season is one step.
    """
    return [step % season - season for step in range(steps)]


def persisted(past: Tensor, ahead: Ahead, season: int) -> Tensor:
    """(B, H, K): the values of the last season (B, T, D), again and again."""
    places = torch.tensor(steps_back(ahead.steps, season), device=past.device) + past.shape[1]
    return past.index_select(1, places)[..., : ahead.targets]


class Persistence(nn.Module):
    """The naive forecast, or the seasonal one: what was one season ago is what will be, in the series' own units."""

    units: Tensor

    def __init__(self, ahead: Ahead, season: int, units: Tensor) -> None:
        """`units` (4, H * K) float64: of each output the mean and deviation by which its column is scaled where it is
        read, and by which it is scaled where it is predicted.
        """
        super().__init__()
        self.ahead, self.season = ahead, season
        self.register_buffer("units", units, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H * K)."""
        read_mean, read_std, mean, std = self.units
        found = persisted(x.double(), self.ahead, self.season).flatten(1)
        return (found * read_std + read_mean - mean) / std


class Compared:
    """Forecasts to compare with: naive, seasonal, by a linear autoregression on the same windows, and the mean."""

    def __init__(self, signature: Signature, ahead: Ahead) -> None:
        self._ahead = ahead
        features = signature.input_size if signature.input_size <= MOST_FEATURES else 0
        self._fitted = LeastSquares(features, signature.num_outputs)
        self._units: Tensor | None = None

    def add(self, batch: Batch) -> None:
        """See Baseline."""
        self._fitted.add(batch)
        if self._units is None:
            self._units = _units(batch, self._ahead)

    def models(self, across: Across, device: torch.device) -> dict[str, nn.Module]:
        """See Baseline."""
        ahead, units = self._ahead, self._units
        told = torch.ones((), dtype=torch.float64, device=device)
        if units is None:  # a rank of more than there are rows
            told, units = told * 0, told.new_zeros(4, ahead.steps * ahead.targets)
        units = across(units) / across(told)
        seasons = {"naive": 1} | ({"seasonal": ahead.season} if ahead.season else {})
        simple = {name: Persistence(ahead, season, units).to(device) for name, season in seasons.items()}
        return {**simple, **self._fitted.models(across, device)}


def _units(batch: Batch, ahead: Ahead) -> Tensor:
    """See Persistence."""
    found = []
    for name, width in (("input", len(ahead.columns)), ("target", ahead.steps * ahead.targets)):
        zeros = torch.zeros(width, dtype=torch.float64, device=batch["target"].device)
        mean = batch.unscale(name, zeros)
        both = torch.stack((mean, batch.unscale(name, zeros + 1) - mean))
        found.append(both[:, : ahead.targets].repeat(1, ahead.steps) if name == "input" else both)
    return torch.cat(found)


class Forecast(Regression):
    """Regression on the H * K numbers that follow; beside its errors the mean absolute scaled one.

        mase = (1 / HK) sum |output - target| / q_k        q_k = mean_t |y[t] - y[t - m]| over the training part

    with a season of m steps, 1 where none is given (Hyndman & Koehler 2006): below 1 it is better on average than a
    forecast of one step (or season) by the naive way was in training.
    """

    metrics = (*Regression.metrics, MASE)

    def __init__(self, ahead: Ahead, *, gathered: tuple[str, ...] = ()) -> None:
        super().__init__(ahead.steps * ahead.targets, gathered=gathered)
        self._ahead = ahead
        # of a constant column nothing can be said by its changes: errors count as they are
        changes = torch.tensor(ahead.changes, dtype=torch.float64, device="cpu")
        self._changes = torch.where(changes > 0, changes, 1.0).repeat(ahead.steps)

    def sums(self, errors: Tensor) -> tuple[Tensor, ...]:
        """See Regression."""
        self._changes = self._changes.to(errors.device)  # once
        return (*super().sums(errors), (errors.abs() / self._changes).sum())

    def baseline(self, signature: Signature, model: ModelSpec) -> Compared:
        """See Objective."""
        return Compared(signature, self._ahead)

    def evidence(self, signature: Signature) -> "ForecastEvidence":
        """See Objective."""
        return ForecastEvidence(self._ahead)


class ForecastEvidence:
    """Of a test: the errors of each step ahead, of the net and of the naive ways; what is forecast for the next step
    and for the last one; and some windows with what follows.
    """

    section = "forecast"

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead
        self._seasons = [1, *([ahead.season] if ahead.season else [])]
        self._errors: Tensor | None = None  # (1 + seasons, H, K): sums of absolute ones
        self._rows, self._num = Gathered(), 0
        self._examples = Examples(1, num=NUM_EXAMPLES)

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """See Evidence: outputs (B, H * K)."""
        shape = (len(outputs), self._ahead.steps, self._ahead.targets)
        past, targets = batch.stored["input"], batch.stored["target"]
        assert isinstance(past, Tensor)
        assert isinstance(targets, Tensor)
        predictions = batch.unscale("target", outputs.double())
        simple = [persisted(past.double(), self._ahead, season) for season in self._seasons]
        true, said = targets.double().view(shape), predictions.view(shape)
        errors = torch.stack([(one - true).abs().sum(0) for one in (said, *simple)])
        self._errors = errors if self._errors is None else self._errors + errors
        self._num += len(outputs)
        # the next step and the last one: true, forecast
        ends = [values[:, place] for place in (0, -1) for values in (true, said)]
        self._rows.add(batch, torch.cat(ends, 1))
        columns = {"inputs": past, "targets": targets.float(), "predictions": predictions.float()}
        scores = torch.from_numpy(batch.place.ids * SPREAD % AMONG).to(outputs.device)
        self._examples.keep(0, batch.place.ids, scores, columns)

    def tensors(
        self, across: Callable[[Tensor], Tensor], device: torch.device, gather: Gather = gather_here
    ) -> dict[str, Tensor]:
        """See Evidence. `errors` (ways, H, K) are means, `ends` (rows, 2, 2, K) next and last step, true and forecast.

        The ways are the net, naive, and seasonal where there is a season.
        """
        ahead, errors = self._ahead, self._errors
        if errors is None:  # a rank of more than there are rows
            shape = (1 + len(self._seasons), ahead.steps, ahead.targets)
            errors = torch.zeros(shape, dtype=torch.float64, device=device)
        num = across(torch.tensor(self._num, dtype=torch.float64, device=device))
        found = {"errors": (across(errors) / num).cpu()}
        rows = self._rows.whole(across, device).cpu()
        found["ends"] = rows.view(len(rows), 2, 2, ahead.targets).contiguous()
        return {**found, **self._examples.tensors(gather, device)}


class ForecastSpec(PredictsNumbers):
    """Predict the next steps of a series: mean squared error of standardised numbers, and the errors in their units."""

    reads = reading(input=Sequence, target=Numbers)
    objective = Forecast
    forecasts = True
    baselines = tuple(
        Metric(f"{name}_{metric.name}", "less", words=f"{metric.in_words} of {words}")
        for name, words in SIMPLE.items()
        for metric in Forecast.metrics
    )
    kind: Literal["forecast"] = "forecast"

    def check_data(self, signature: Signature, *, source: str) -> None:
        """See ObjectiveSpec."""
        super().check_data(signature, source=source)
        if _ahead(signature) is None:
            raise UserError(
                "objective.kind",
                f"forecast needs the next steps of a series, but {source} has other numbers to predict",
                "set objective.kind to regression",
            )

    def build(self, signature: Signature) -> Forecast:
        """The objective."""
        ahead = _ahead(signature)
        assert ahead is not None  # check_data refuses other numbers
        return Forecast(ahead, gathered=self.metrics)


def _ahead(signature: Signature) -> Ahead | None:
    target = signature["target"]
    return target.ahead if isinstance(target, Numbers) else None
