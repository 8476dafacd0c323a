"""Pinned bits: rows, losses and shards stay what they were when pinned.json was recorded, however the code is arranged.

Digests of rows and content of shards are compared exactly, losses within what another CPU's order of sums does to them.
With MANTA_PINS=exact in the environment losses are compared bit for bit: on the machine that recorded them only, and
with the same versions of torch and NumPy. `python -m tests.unit.test_pinned` records anew what is meant to change.
"""

import hashlib
import json
import os
import re
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.unit import pinned_runs

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch's own
]

PINNED = Path(__file__).with_name("pinned.json")
EXACT = os.environ.get("MANTA_PINS") == "exact"

RANDOM = {"stratify": False}  # as all splits were when these were recorded
DIGITS = {"kind": "digits", **RANDOM}
TRAIN = {"epochs": 3, "global_batch_size": 64, "log_every_steps": 1}
MLP = {
    "model": {"kind": "mlp", "hidden": [128], "activation": "relu"},
    "data": DIGITS,
    "optimizer": {"kind": "adamw", "lr": 3e-3},
    "schedule": {"kind": "cosine"},
    "train": TRAIN,
}
GAN = {
    "data": DIGITS,
    "objective": {"kind": "adversarial"},
    "optimizer": {"kind": "adam", "lr": 5e-4, "betas": [0.5, 0.999]},
    "train": TRAIN | {"epochs": 2, "global_batch_size": 128, "ema_decay": 0.99},
    "adversarial": {"quality": {"every_epochs": 2}},
}
# few rows to train on: few steps
EDGES = {"kind": "pairs", "edges_of": {"kind": "digits", "image_size": [16, 16]}, "test_fraction": 0.6, **RANDOM}
# The built-in recipes as they were, which may change where these may not; fewer steps, as each one lets rounding grow.
RECIPES: dict[str, dict[str, Any]] = {
    "digits-mlp": MLP,
    "digits-mlp, streamed": MLP | {"data": DIGITS | {"shuffle_window": 256}},
    "digits-cnn": MLP
    | {
        "model": {"kind": "cnn", "channels": [32, 64], "batch_norm": True, "hidden": [128], "dropout": 0.3},
        "schedule": {"kind": "cosine", "warmup_steps": 20},
        "train": TRAIN | {"global_batch_size": 128, "ema_decay": 0.98},
    },
    "digits-dcgan": GAN | {"model": {"kind": "dcgan", "width": 32, "noise_size": 64}},
    "digits-conditional-gan": GAN
    | {
        "model": {"kind": "conditional_gan", "width": 32, "noise_size": 64, "embedding_size": 16},
        "objective": {"kind": "adversarial", "label_smoothing": 0.1},
    },
    "edges to digits": GAN
    | {
        "model": {"kind": "pix2pix", "width": 8},
        "data": EDGES,
        "objective": {"kind": "adversarial", "l1_weight": 10.0},
        "train": GAN["train"] | {"global_batch_size": 64},
    },
}
FUSED = {
    f"digits-mlp, fused with lr {lr} and seed {seed}": MLP
    | {"optimizer": {"kind": "adamw", "lr": lr}, "train": TRAIN | {"seed": seed}}
    for lr, seed in ((3e-3, 0), (1e-2, 1), (1e-3, 1))
}
DATA = {"digits": DIGITS, "edges": EDGES, "digits, stratified": {"kind": "digits"}}
TABLES = ("number targets", "labels", "images")

LOSSES = ("loss", "generator_loss", "discriminator_loss", "l1")
EVALUATED = ("loss", "accuracy")


# -- what is measured: of runs only metrics.jsonl is read, of data sets their shards and their manifest ----------------


def run_names() -> dict[str, tuple[str, int]]:
    """Recipe and number of ranks (0: this process) by the name of each run but the fused ones."""
    sizes = (0, pinned_runs.WORLD_SIZE)
    return {f"{name}, {size} ranks": (name, size) for size in sizes for name in RECIPES}


def train_all(folder: Path) -> dict[str, Any]:
    """Train everything in `folder`. Returns the figures of each run."""
    names = run_names()
    runs = {name: folder / name for name in (*names, *FUSED)}
    alone = {runs[name]: RECIPES[recipe] for name, (recipe, size) in names.items() if not size}
    ranked = {runs[name]: RECIPES[recipe] for name, (recipe, size) in names.items() if size}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANTA_CACHE", str(folder / "cache"))  # other tests need better classifiers
        pinned_runs.prepare_quality(list(RECIPES.values()))
        with pinned_runs.training_on_ranks(list(ranked.values()), list(ranked)):
            for run, recipe in alone.items():
                pinned_runs.train(recipe, run)
            pinned_runs.train_fused(list(FUSED.values()), [runs[name] for name in FUSED])
    return {name: figures(run) for name, run in runs.items()}


def figures(run: Path) -> dict[str, Any]:
    """The digest of each epoch's rows, the losses of each step and epoch, and what other splits say of a digits-mlp."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    epochs = [line for line in train if "rows_digest" in line]
    steps = [line for line in train if "rows_digest" not in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    found = {
        "rows_digest": [line["rows_digest"] for line in epochs],
        "steps": columns(steps, LOSSES),
        "epochs": columns(epochs, LOSSES),
    }
    if run.name.startswith("digits-mlp"):  # no moving average: the weights that are evaluated are those trained
        for split in ("validation", "test"):
            found[split] = columns([line for line in lines if line["split"] == split], EVALUATED)
    return found


def columns(lines: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: [line[name] for line in lines] for name in names if name in lines[0]}


def write_all(folder: Path) -> dict[str, Any]:
    """Prepare every data set in `folder`. Returns what the manifests say, and each shard's content beside its entry."""
    sections = DATA | pinned_runs.made_tables(folder / "files")
    for name, section in sections.items():
        pinned_runs.prepare_data(section, folder / name)
    return {name: contents(folder / name) for name in sections}


def contents(folder: Path) -> dict[str, Any]:
    manifest = pinned_runs.described(folder)
    for shard in chain(*manifest["splits"].values()):
        file, table = folder / shard["file"], pq.read_table(folder / shard["file"])
        assert shard["bytes"] == file.stat().st_size
        assert shard["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        shard["writer"] = pq.ParquetFile(file).metadata.created_by
        shard["columns"] = {name: checksum(table[name].combine_chunks()) for name in table.column_names}
    return manifest


def checksum(column: pa.Array) -> str:
    """Type, shape and checksum of a column's values, whatever pyarrow calls the type that they are stored as."""
    if pa.types.is_fixed_size_binary(column.type):
        values = np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(len(column), -1)
    elif pa.types.is_fixed_size_list(column.type):
        values = column.flatten().to_numpy().reshape(len(column), -1)
    else:
        values = column.to_numpy()
    return f"{values.dtype} {values.shape} {hashlib.sha256(values.tobytes()).hexdigest()}"


def record() -> None:
    """Write pinned.json anew."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"runs": train_all(Path(folder) / "runs"), "data": write_all(Path(folder) / "data")}
    # indented, but a list of numbers is one line
    text = json.dumps(found, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    PINNED.write_text(text + "\n")


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pinned():
    return json.loads(PINNED.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return train_all(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", [*run_names(), *FUSED])
def test_a_run_takes_the_same_rows_to_the_same_losses(name, runs, pinned):
    found, wanted = runs[name], pinned["runs"][name]
    assert found["rows_digest"] == wanted["rows_digest"]
    if EXACT:
        assert found == wanted
    assert found.keys() == wanted.keys()
    for part in found.keys() - {"rows_digest"}:
        assert found[part] == {metric: close(values, metric) for metric, values in wanted[part].items()}, part
    for metric in wanted["steps"].keys() - {"generator_loss"}:  # which comes after the discriminator's first step
        # before any step is taken only sums in another order count: float32, up to 2e-7 seen
        assert found["steps"][metric][0] == pytest.approx(wanted["steps"][metric][0], rel=2e-6), metric


def close(values: list[float], metric: str) -> Any:
    """What may come of these values where float32 sums are taken in another order.

    As a rule a loss then differs by up to 6e-7, however many steps were taken. But where a sum of nearly 0 gets another
    sign, a rectifier or Adam (whose first steps are of one length for any gradient) makes 1e-5 of it at once, and a GAN
    a hundred times as much in the ten steps that follow. The most seen was 2e-3: in 140 runs from weights that differed
    by a rounding, and with other instructions and threads (ATEN_CPU_CAPABILITY=default, or avx2 with
    ONEDNN_MAX_CPU_ISA=AVX2, or SSE41 with MKL_CBWR=COMPATIBLE; two threads).
    """
    if metric == "accuracy":
        return pytest.approx(values, abs=0.006)  # a row of 180; none was seen to change
    return pytest.approx(values, rel=1e-2)  # five times the most seen


@pytest.mark.parametrize("name", [*DATA, *TABLES])
def test_a_data_set_keeps_its_rows_bytes_and_manifest(name, data, pinned):
    found, wanted = dict(data[name]), dict(pinned["data"][name])
    ours, theirs = found.pop("splits"), wanted.pop("splits")
    assert ours.keys() == theirs.keys()
    for shard, other in zip(chain(*ours.values()), chain(*theirs.values()), strict=True):
        if shard["writer"] == other["writer"]:
            assert shard == other
        else:  # another version of pyarrow, which writes the same values as other bytes
            kept = shard.keys() - {"writer", "bytes", "sha256"}
            assert {name: shard[name] for name in kept} == {name: other[name] for name in kept}
    if not EXACT:
        for moments in ("mean", "std"):
            # float64 sums of up to 80,000 numbers in another order
            assert found.pop(moments) == pytest.approx(wanted.pop(moments), rel=1e-11, abs=1e-11)
    assert found == wanted


if __name__ == "__main__":
    record()
