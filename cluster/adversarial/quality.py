"""Quality: how near made rows are to held-out real ones, as numbers that can be followed through training.

    frechet_distance   |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), of means m and covariances S of the features of real
                       and made rows (Heusel et al. 2017, eq. 6); 0 for the same distribution
    kernel_distance    squared maximum mean discrepancy with the kernel (x y / F + 1)^3, KID (Binkowski et al. 2018,
                       section 4); unbiased: 0 on average, and sometimes less, for the same distribution
    frechet_floor,     the same two between training rows and the held-out ones, as many as are made: what perfect
    kernel_floor       rows would reach
    diversity          mean distance between two made rows as a share of that between two real ones; about 1 where they
                       are as diverse, 0 where all are the same
    label_agreement    where labels are given: share of rows that the classifier takes for what they were to be
    l1                 where images are given: mean |made - real| over all numbers of all rows, in units of [-1, 1]

Which of them there are is what the objective declares that it reports.

The Frechet distance is biased: with n rows it is too large by about the number of features over n, and from no more
rows than features the covariances cannot even be told. So it means something only beside its floor, which is biased
alike. The features are of a classifier that has seen the training rows, which makes the floor a little higher still.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from cluster.adversarial.features import Features
from cluster.adversarial.halves import described, sample
from cluster.data.manifest import Manifest
from cluster.data.scaling import Scaling
from cluster.data.shards import DataSet, some_rows
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.checkpoints import restore_model
from nn_models.adversarial import Halves
from nn_models.adversarial_losses import METRICS

# (source (B, noise_size), condition or None) -> rows (B, *input_shape), images in [-1, 1]; all on the CPU.
Make = Callable[[Tensor, Tensor | None], Tensor]

SEED = 0  # of the noise: not the run's, so that runs can be compared, and a run with its evaluation
BATCH_ROWS = 250  # that are made at once
SUBSET_ROWS = 1000  # of a subset that the kernel distance is taken of, and how many subsets
SUBSETS = 10
SHIFTS = 16  # distances that a row's diversity is taken of
DISTANCES = ("frechet_distance", "kernel_distance")


class Quality:
    """Compares what a generator makes with rows of one split, which training has not seen.

    It makes as many rows as it compares them with: `num_rows`, the most of `quality.num_images` that there are. Noise,
    conditions and the generator of torch's random numbers are the same at each look.
    """

    def __init__(self, features: Features | None, data: DataSet, *, recipe: Recipe, split: str = "validation") -> None:
        """`features` are those that `open_features` has for the data.

        Raises UserError where the split has too few rows.
        """
        model, objective, section = described(recipe)
        reported = objective.reported(model, data.manifest.signature)
        self.best_metric = reported.best  # less of which is better; None where there is nothing to choose by
        self._names = [metric.name for metric in reported.validation]
        self.num_rows = section.quality.num_rows(data.manifest, split)
        self._features = features
        rows = read_rows(data, split, self.num_rows, recipe=recipe)
        self._real = rows["input"]
        self._source = torch.randn(self.num_rows, model.noise_size, generator=torch.Generator().manual_seed(SEED))
        self._condition = rows[model.given] if model.given else None

        seen = self._see(self._real)
        self._spread = _spread(seen)
        self._distances: _Distances | None = None
        self.floor: dict[str, float] = {}
        if set(DISTANCES) & set(self._names):
            self._distances = _Distances(seen)
            training = self._see(read_rows(data, "train", self.num_rows, recipe=recipe)["input"])
            reached = dict(zip(DISTANCES, self._distances(training), strict=True))
            self.floor = {name: reached[metric.floor_of] for name, metric in METRICS.items() if metric.floor_of}

    def measure(self, make: Make) -> dict[str, float]:
        """The metrics of this file's head that apply; NaN, but for the floor, where made rows are not finite."""
        made = self._made(make)
        metrics = self._metrics(made) if made.isfinite().all() else dict.fromkeys(self._names, float("nan"))
        return {**metrics, **self.floor}

    def _made(self, make: Make) -> Tensor:
        batches = zip(
            self._source.split(BATCH_ROWS),
            [None] * self.num_rows if self._condition is None else self._condition.split(BATCH_ROWS),
            strict=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)  # not the GPU's stream; pix2pix has dropout for its noise
            return torch.cat([make(source, condition) for source, condition in batches])

    def _metrics(self, made: Tensor) -> dict[str, float]:
        seen = self._see(made)
        found = {"diversity": _spread(seen) / max(self._spread, 1e-30)}
        if self._distances:
            found |= zip(DISTANCES, self._distances(seen), strict=True)
        if "label_agreement" in self._names:
            assert self._features is not None
            assert self._condition is not None
            labels = torch.cat([self._features.predict(rows).cpu() for rows in self._batches(made)])
            found["label_agreement"] = float((labels == self._condition).double().mean())
        if "l1" in self._names:
            found["l1"] = float((made - self._real).abs().mean(dtype=torch.float64))
        return {name: found[name] for name in self._names}

    def _see(self, rows: Tensor) -> Tensor:
        """Rows (B, *input_shape) -> float64 (B, F), in which sums of squares are not rounded away."""
        if self._features is None:
            return rows.flatten(1).double()
        return torch.cat([self._features(batch).cpu() for batch in self._batches(rows)]).double()

    def _batches(self, rows: Tensor) -> Iterator[Tensor]:
        assert self._features is not None
        for batch in rows.split(BATCH_ROWS):
            yield batch.to(self._features.device)


def read_rows(data: DataSet, split: str, num_rows: int, *, recipe: Recipe) -> Mapping[str, Tensor]:
    """Some rows of a split as halves are given them, on the CPU: images in [-1, 1], feature vectors standardised.

    So many, or all where there are no more; always the same ones.
    """
    device = torch.device("cpu")
    rows, columns = some_rows(data, split, num_rows), data.manifest.columns
    stored = {name: rows.columns[name].collate(columns[name].column, device) for name in recipe.columns}
    scaling = Scaling({name: columns[name] for name in stored}, recipe.scale, device)
    return cast(Mapping[str, Tensor], scaling(stored))  # halves read no rows of different lengths


def _spread(features: Tensor) -> float:
    """Mean distance between two rows; each row, in whatever order they are, is compared with the next few."""
    shifts = range(1, min(SHIFTS, len(features) - 1) + 1)
    return sum(float((features - features.roll(shift, 0)).norm(dim=1).mean()) for shift in shifts) / len(shifts)


class _Given(nn.Module):
    """Features that are computed already: torchmetrics' extractor where both distances are to share them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Distances:
    """Frechet and kernel distance of features (B, F) from those of the same real rows."""

    def __init__(self, real: Tensor) -> None:
        given = _Given(real.shape[1])
        self._frechet = FrechetInceptionDistance(given, reset_real_features=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which are few
            self._kernel = KernelInceptionDistance(
                given,
                subsets=SUBSETS if len(real) > SUBSET_ROWS else 1,
                subset_size=min(SUBSET_ROWS, len(real)),
                reset_real_features=False,
            )
        for distance in (self._frechet, self._kernel):
            distance.update(real, real=True)

    def __call__(self, made: Tensor) -> tuple[float, float]:
        for distance in (self._frechet, self._kernel):
            distance.reset()
            distance.update(made, real=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)  # of the subsets; not the GPU's stream
            kernel, _ = self._kernel.compute()
        # rounding takes a distance of nothing below it
        return max(0.0, float(self._frechet.compute())), float(kernel)


def measured(
    run: Folder,
    recipe: Recipe,
    data: DataSet,
    features: Features | None,
    *,
    split: str,
    device: torch.device | None = None,
) -> tuple[dict[str, float], int]:
    """The Quality of a run's best generator on a split, and of how many rows it was measured."""
    halves = restored_halves(run, recipe)[0].to(device or torch.device("cpu"))
    quality = Quality(features, data, recipe=recipe, split=split)
    found = quality.measure(
        lambda source, condition: sample(halves.generator, source, condition, device=device or torch.device("cpu"))
    )
    return found, quality.num_rows


def restored_halves(run: Folder, recipe: Recipe) -> tuple[Halves, Manifest]:
    """Both halves of a run's best model, and the description of its data."""
    model, saved = restore_model(run, recipe)
    assert isinstance(model, Halves)
    return model, saved.manifest
