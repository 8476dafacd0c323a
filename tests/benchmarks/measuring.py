"""Measuring: manta and another side by side, the median of their ratios, and the one JSON line a benchmark prints."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.data.manifest import MANIFEST
from cluster.data.prepare import prepared
from cluster.data.rows import table_rows
from cluster.data.scaling import Scaling
from cluster.data.shards import DataSet, write_shard
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder

BY_HAND = Path(__file__).parent / "by_hand"  # what manta is compared with, where that needs processes of its own
BATCH = 128
MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"kind": "cnn", "channels": [32, 64], "batch_norm": True},
    "mlp": {"kind": "mlp", "hidden": [512, 512]},
}


@dataclass(frozen=True)
class Case:
    """One comparison: pairs of (manta, other) measured side by side, and what their ratio must be (`>= 0.97`)."""

    name: str
    wanted: str
    unit: str
    pairs: Sequence[tuple[float, float]]

    @property
    def ratios(self) -> list[float]:
        return [manta / other for manta, other in self.pairs]

    @property
    def ratio(self) -> float:
        """The median over pairs: what disturbs the machine disturbs both of a pair, or spoils only that pair."""
        return statistics.median(self.ratios)

    @property
    def margin(self) -> float:
        """1 where the ratio is just what is wanted, more where it is better."""
        sign, bound = self.wanted.split()
        return self.ratio / float(bound) if sign == ">=" else float(bound) / self.ratio

    def figures(self) -> dict[str, Any]:
        manta, other = zip(*self.pairs, strict=True)
        return {
            "manta": round(statistics.median(manta), 3),
            "other": round(statistics.median(other), 3),
            "unit": self.unit,
            "ratio": round(self.ratio, 4),
            "wanted": self.wanted,
            "met": self.margin >= 1,
            "repetitions": len(self.pairs),
            "spread": [round(min(self.ratios), 4), round(max(self.ratios), 4)],
        }


def publish(benchmark: str, cases: Iterable[Case], **context: Any) -> None:
    """Print the line: the figures of the case nearest to failing, `met` where all are met, and every case by name."""
    by_margin = sorted(cases, key=lambda case: case.margin)
    line = {"benchmark": benchmark, "case": by_margin[0].name, **by_margin[0].figures()}
    if len(by_margin) > 1:
        line["cases"] = {case.name: case.figures() for case in by_margin}
    _print({**line, **context})


def skip(benchmark: str, reason: str) -> None:
    """Print the line of a benchmark that cannot run here."""
    _print({"benchmark": benchmark, "skipped": reason})


def _print(line: Mapping[str, Any]) -> None:
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "machine": platform.machine()}
    print(json.dumps({**line, **machine}), flush=True)


def options(description: str | None, **defaults: int | str) -> argparse.Namespace:
    """Whole numbers and words that the command line may change, such as `--repetitions 3`."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
        )
    return parser.parse_args()


def in_turn(
    repetitions: int, manta: Callable[[], float], other: Callable[[], float], *, warm_up: bool = True
) -> list[tuple[float, float]]:
    """What both return, call by call, after a first one of each that does not count; who goes first changes."""
    if warm_up:
        manta(), other()
    pairs = []
    for repetition in range(repetitions):
        if repetition % 2:
            others = other()
            pairs.append((manta(), others))
        else:
            mantas = manta()
            pairs.append((mantas, other()))
    return pairs


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="manta-benchmark-") as directory:
        yield Path(directory)


def fresh_process(*command: str | Path, **settings: str) -> tuple[float, str]:
    """Run Python with these arguments to its end: (wall seconds, standard output). A failure shows what it wrote."""
    line = [sys.executable, *map(str, command)]
    began = time.perf_counter()
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # a Ray of its own, if any
    process = subprocess.run(line, capture_output=True, text=True, env={**here, **settings}, check=False)
    wall_s = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(line)}\nended with {process.returncode}:\n{process.stdout}{process.stderr}")
    return wall_s, process.stdout


def fashion(folder: Path, *, rows: int = 0) -> DataSet:
    """The first `rows` training rows of Fashion-MNIST (0 for all 54,000), with nothing to evaluate on, as shards."""
    whole = prepared(load_recipe({"model": MODELS["mlp"], "data": {"kind": "fashion_mnist"}}).data)
    some = table_rows(whole.table("train").slice(0, rows or None), whole.manifest)
    place = Folder(folder).create()
    shard = write_shard(place, "train-00000.parquet", some, whole.manifest.columns)
    manifest = whole.manifest.model_copy(update={"splits": {"train": (shard,)}})
    place.write_text(MANIFEST, manifest.model_dump_json())
    return DataSet(place)


def ready(data: DataSet, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All training rows as a hand-written loop holds them: inputs scaled already, and targets."""
    rows = table_rows(data.table("train"), data.manifest)
    stored = {name: torch.from_numpy(layout.values.copy()).to(device) for name, layout in rows.columns.items()}
    scaled = Scaling(data.manifest.columns, "standard", device)(stored)
    return scaled["input"], scaled["target"]


def fashion_recipe(model: str, data: DataSet, **train: Any) -> Recipe:
    """The recipe of one of MODELS on such shards."""
    return load_recipe(
        {
            "model": MODELS[model],
            "data": {"kind": "shards", "path": str(data.folder)},
            "train": {"global_batch_size": BATCH, **train},
        }
    )


def epoch_ends(run: Path) -> list[float]:
    """Seconds from a run's start to the last step of each epoch. Its data have no validation split."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["time_s"] for line in lines if line.get("end_of_epoch")]
