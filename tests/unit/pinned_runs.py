"""The runs and data sets that test_pinned.py pins: all that it needs of the project's own interfaces.

`python -m tests.unit.pinned_runs JOBS` is what `training_on_ranks` starts; JOBS is a JSON list of {"recipe", "run"}.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

import cluster
from cluster.adversarial.coordinator import Coordinator
from cluster.adversarial.features import Features, open_features
from cluster.adversarial.halves import DiscriminatorHalf, GeneratorHalf
from cluster.adversarial.players import LocalPlayers, Played
from cluster.data.manifest import MANIFEST
from cluster.data.prepare import prepare, prepared
from cluster.data.shards import DataSet
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe, TrainSpec
from cluster.storage import Folder
from cluster.training.context import GroupContext
from cluster.training.loop import fit
from cluster.training.run_directory import RunDirectory
from cluster.training.splits import Splits, open_splits
from cluster.tuning.fused.loop import FusedLoop
from nn_models.spec import validate
from tests.unit import made
from tests.unit.ranks import forked

CPU = torch.device("cpu")
WORLD_SIZE = 2  # of what is trained by several ranks

Section = dict[str, Any]  # a recipe, or one of its sections, as in YAML


# -- what the test calls: each leaves a run directory, or a prepared data set ---------------------------------------


def prepare_quality(recipes: Sequence[Section]) -> None:
    """Store hardly trained classifiers in the cache: the quality of what GANs make is not pinned, and takes no time."""
    for recipe in map(load_recipe, recipes):
        if recipe.adversarial is not None:
            open_features(prepared(recipe.data), train=TrainSpec(epochs=1))


def train(recipe: Section, run: Path) -> None:
    """Train in this process."""
    cluster.train(recipe, run=str(run))


@contextmanager
def training_on_ranks(recipes: Sequence[Section], runs: Sequence[Path]) -> Iterator[None]:
    """Train each recipe on two ranks, processes over gloo without Ray, while the caller does other things."""
    jobs = [{"recipe": recipe, "run": str(run)} for recipe, run in zip(recipes, runs, strict=True)]
    with subprocess.Popen([sys.executable, "-m", "tests.unit.pinned_runs", json.dumps(jobs)]) as process:
        yield
    assert process.returncode == 0


def train_fused(recipes: Sequence[Section], runs: Sequence[Path]) -> None:
    """Train recipes that differ only in values which can be batched as one model, in this process."""
    trials = [load_recipe(recipe) for recipe in recipes]
    splits = open_splits(prepared(trials[0].data), window=None)
    folders = [Folder(run).create() for run in runs]
    with FusedLoop(trials, splits=splits, runs=folders, device=CPU) as loop:
        while not loop.ended:
            loop.epoch()
        loop.conclude()


def prepare_data(data: Section, out: Path) -> None:
    """Write the shards and the manifest of a recipe's data section."""
    prepare(validate(AnyDataSpec, data, prefix="data"), Folder(out))


def described(out: Path) -> dict[str, Any]:
    """What the manifest says of a data set, by the names of its version 1."""
    content: dict[str, Any] = json.loads((out / MANIFEST).read_text())
    manifest = DataSet(Folder(out)).manifest
    signature, stored = manifest.signature, manifest.columns["input"]
    known = {
        "version": 1,
        "source": manifest.source,
        "input_shape": list(signature.input_shape),
        "input_dtype": stored.dtype,
        "target_kind": "label" if signature["target"].kind == "label" else "number",
        "num_outputs": signature.num_outputs,
        "class_names": list(manifest.class_names),
        "mean": list(stored.mean),
        "std": list(stored.std),
        "splits": content["splits"],
    }
    if signature.condition_shape:
        known["condition_shape"] = list(signature.condition_shape)
    return known


def made_tables(folder: Path) -> dict[str, Section]:
    """Data sections of small Parquet files, made in `folder`."""
    specs = {
        "number targets": made.features(folder / "numbers", 300, target="number"),
        "labels": made.features(folder / "labels", 300, stratify=False),
        "images": made.images(folder / "images", 300, stratify=False),
    }
    return {name: spec.model_dump(exclude_defaults=True) | {"kind": spec.kind} for name, spec in specs.items()}


# -- one rank --------------------------------------------------------------------------------------------------------


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        recipe, run = load_recipe(job["recipe"]), Folder(job["run"])
        data = prepared(recipe.data)
        splits = open_splits(data, window=recipe.data.shuffle_window)
        if recipe.adversarial is None:
            work = partial(_fit, recipe, splits, run)
        else:
            work = partial(_play, recipe, data, splits, open_features(data), run)
        codes = forked(work, world_size=WORLD_SIZE)
        assert codes == [0] * WORLD_SIZE, f"{run}: the ranks ended with {codes}"


def _fit(recipe: Recipe, splits: Splits, run: Folder, rank: int) -> None:
    fit(recipe, context=GroupContext(run=run, splits=splits, device=CPU))


def _play(recipe: Recipe, data: DataSet, splits: Splits, features: Features | None, run: Folder, rank: int) -> None:
    """Each rank has a coordinator: they see the same sums and so do the same. Only rank 0's files are of interest."""
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = run if rank == 0 else Folder(elsewhere) / "run"
        RunDirectory(folder).begin(recipe, {})
        coordinator = Coordinator(
            recipe,
            data,
            run=folder,
            features=features,
            start=lambda: ReplicaPlayers(recipe, splits),
            replicas=WORLD_SIZE,
        )
        with closing(coordinator):
            for _ in coordinator.epochs():
                pass
            coordinator.conclude()


class ReplicaPlayers(LocalPlayers):
    """A replica of both halves in each rank: what several pairs of actors compute, with the same sums."""

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        super().__init__(recipe, splits, device=CPU)
        signature = splits.manifest.signature
        self.generator = GeneratorHalf(recipe, signature, device=CPU, reduce=_sum_over_ranks)
        self.discriminator = DiscriminatorHalf(recipe, signature, device=CPU, reduce=_sum_over_ranks)
        self._rows = splits.training(recipe, rank=distributed.get_rank(), world_size=WORLD_SIZE, device=CPU)

    def play(self, first_step: int, num_steps: int, rate: float) -> Played:
        """See Players."""
        played = super().play(first_step, num_steps, rate)
        self.generator.average_buffers(WORLD_SIZE)
        self.discriminator.average_buffers(WORLD_SIZE)
        distributed.all_reduce(torch.from_numpy(played.sums))
        distributed.all_reduce(torch.from_numpy(played.digest))
        return played


def _sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """In place, in one exchange for all, as the actors do it."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


if __name__ == "__main__":
    main()
