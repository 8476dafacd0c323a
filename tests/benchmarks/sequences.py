"""Sequences: tokens a second in a whole training step of a language model, against the same net in a plain loop.

Elman nets, LSTMs and GRUs against torch.nn's modules; the LSTM with peepholes, for which torch has none, against a
Python loop over time with the paper's equations gate by gate. Beside that ratio stands the most that it could be
(`bound`): the plain loop's time over that of its matrix products alone, each as few and as large as the recurrence
allows.

And batches of rows of like length (data.bucket) against those that are not: tokens a second, and the share of the
steps that are padding.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Case, in_turn, options, publish, scratch, skip
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.data.layouts import Dense, Layout, Ragged
from cluster.data.manifest import MANIFEST, Manifest, StoredColumn
from cluster.data.rows import Rows
from cluster.data.shards import DataSet, write_shard
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.context import LocalContext
from cluster.training.loop import Loop
from cluster.training.splits import open_splits
from nn_models.columns import AnyColumn, Label, Labels, Tokens

WORDS, CLASSES = 96, 4
# name: units and numbers of a word, rows of a batch, steps
SIZES = {"small": (32, 16, 64), "medium": (128, 32, 64), "wide": (256, 64, 32)}
BUCKET, BUCKET_BATCH, BUCKET_UNITS = 8, 32, 64


class PlainPeephole(nn.Module):
    """Gers & Schmidhuber 2000 as it is written down, for autograd."""

    def __init__(self, num_inputs: int, num_units: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict({gate: nn.Linear(num_inputs, num_units) for gate in "ifgo"})
        self.states = nn.ModuleDict({gate: nn.Linear(num_units, num_units, bias=False) for gate in "ifgo"})
        self.peepholes = nn.ParameterDict({gate: torch.zeros(num_units) for gate in "ifo"})
        self.num_units = num_units

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(B, T, D) -> (B, T, H)."""
        h = c = x.new_zeros(len(x), self.num_units)
        said = []
        for now in x.unbind(1):
            z = {gate: self.inputs[gate](now) + self.states[gate](h) for gate in "ifgo"}
            i = torch.sigmoid(z["i"] + self.peepholes["i"] * c)
            f = torch.sigmoid(z["f"] + self.peepholes["f"] * c)
            c = f * c + i * torch.tanh(z["g"])
            o = torch.sigmoid(z["o"] + self.peepholes["o"] * c)
            h = o * torch.tanh(c)
            said.append(h)
        return torch.stack(said, 1), None


CELLS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "rnn": (lambda size: nn.RNN(size, size, batch_first=True), ">= 0.97"),
    "lstm": (lambda size: nn.LSTM(size, size, batch_first=True), ">= 0.97"),
    "gru": (lambda size: nn.GRU(size, size, batch_first=True), ">= 0.97"),
    "peephole_lstm": (lambda size: PlainPeephole(size, size), ">= 8"),
}


def now() -> float:
    """Seconds; on one CPU thread those it computes in, so that others on the machine count less."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()
    return time.process_time() if alone else time.perf_counter()


def shards(folder: Path, rows: dict[str, Layout], columns: dict[str, AnyColumn]) -> DataSet:
    """These rows, all to train on, as shards."""
    place, num_rows = Folder(folder).create(), len(rows["input"])
    stored = {
        name: StoredColumn(
            column=column,
            dtype="int64" if isinstance(column, Label) else "int32",
            elements=0.0 if column.layout == "dense" else float(np.mean(rows[name].lengths)),
        )
        for name, column in columns.items()
    }
    shard = write_shard(place, "train-00000.parquet", Rows(np.arange(num_rows), rows), stored)
    manifest = Manifest(source="made", columns=stored, splits={"train": (shard,)})
    place.write_text(MANIFEST, manifest.model_dump_json())
    return DataSet(place)


def windows(folder: Path, num_rows: int, length: int) -> DataSet:
    """Random words, and after each the next."""
    text = np.random.default_rng(0).integers(0, WORDS, (num_rows, length + 1), dtype=np.int32)
    rows: dict[str, Layout] = {"input": Dense(text[:, :-1]), "target": Dense(text[:, 1:])}
    return shards(
        folder, rows, {"input": Tokens(size=WORDS, length=length), "target": Labels(size=WORDS, length=length)}
    )


def described(cell: str, size: int, batch: int, objective: str, data: DataSet, **fields: Any) -> Recipe:
    """The recipe of one case."""
    content = {
        "model": {"kind": cell, "hidden": size, "embedding": size},
        "data": {"kind": "shards", "path": str(data.folder), **fields},
        "objective": {"kind": objective},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "train": {"global_batch_size": batch, "epochs": 10**6},
    }
    return load_recipe(content)


def classifier(cell: str, bucket: int | None, data: DataSet) -> Recipe:
    """The recipe of one on texts."""
    return described(cell, BUCKET_UNITS, BUCKET_BATCH, "classification", data, bucket=bucket)


def plain(recipe: Recipe, data: DataSet, device: torch.device) -> Callable[[], float]:
    """An epoch of the least that trains the same net: tokens a second."""
    rows = open_splits(data, window=None).held("train", device, names=frozenset({"input", "target"}))
    stored = rows.gather(np.arange(rows.num_rows))
    words, following = (stored[name].long() for name in ("input", "target"))  # type: ignore[union-attr]
    size = recipe.model.hidden  # type: ignore[union-attr]
    embedding, core, output = nn.Embedding(WORDS, size), CELLS[recipe.model.kind][0](size), nn.Linear(size, WORDS)
    torch.manual_seed(recipe.train.seed)
    ours: Any = recipe.model.build(data.manifest.signature)
    embedding.load_state_dict(ours.embedding.state_dict())
    output.load_state_dict(ours.output.state_dict())
    if isinstance(core, nn.RNNBase):  # oneDNN's time depends on the numbers
        core.load_state_dict(ours.layers.core.state_dict())
    net = nn.ModuleList([embedding, core, output]).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def epoch() -> float:
        began = now()
        for chosen in torch.randperm(len(words), device=device).split(recipe.train.global_batch_size):
            optimizer.zero_grad()
            said, _ = core(embedding(words[chosen]))
            loss = F.cross_entropy(output(said).flatten(0, 1), following[chosen].flatten())
            loss.backward()
            optimizer.step()
        loss.item()  # the device is done
        return words.numel() / (now() - began)

    return epoch


def trained(recipe: Recipe, data: DataSet, run: Path, stack: ExitStack, device: torch.device) -> Callable[[], float]:
    """The same of manta's loop, without the epoch's end: steps, and their lines of metrics."""
    splits = open_splits(data, window=None)
    loop = Loop(recipe, LocalContext(run=Folder(run).create(), splits=splits, device=device))
    stack.callback(loop.close)
    elements = data.manifest.signature["input"].length or data.manifest.columns["input"].elements  # type: ignore[union-attr]
    num_tokens = data.manifest.rows("train") * elements

    def epoch() -> float:
        began = now()
        loop._epoch()  # ends with a line of metrics, so the device is done
        spent = now() - began
        loop.progress.next_epoch()
        return num_tokens / spent

    return epoch


def cells(folder: Path, device: torch.device, tokens: int, repetitions: int) -> Iterator[Case]:
    """Every cell in every size."""
    for name, (size, batch, length) in SIZES.items():
        data = windows(folder / name, tokens // (batch * length) * batch, length)
        for cell, (_, wanted) in CELLS.items():
            recipe = described(cell, size, batch, "next_token", data)
            with ExitStack() as stack:
                manta = trained(recipe, data, folder / f"{cell}-{name}", stack, device)
                pairs = in_turn(repetitions, manta, plain(recipe, data, device))
            yield Case(f"{cell}, {name}", wanted, "tokens/s", pairs)


def bound(size: int, batch: int, length: int, device: torch.device, repetitions: int) -> float:
    """The plain peephole loop's time over that of its products: what no way to compute the cell could be better by."""
    core, x = PlainPeephole(size, size).to(device), torch.randn(batch, length, size, device=device, requires_grad=True)
    h, z = torch.randn(batch, size, device=device), torch.randn(batch, 4 * size, device=device)
    weight, all_z = torch.randn(4 * size, size, device=device), torch.randn(batch * length, 4 * size, device=device)
    all_x = torch.randn(batch * length, size, device=device)
    after_h, after_z = torch.empty_like(h), torch.empty_like(z)

    def products() -> None:
        torch.mm(all_x, weight.t())  # inputs
        for _ in range(length):
            torch.mm(h, weight.t(), out=after_z)
        for _ in range(length):
            torch.mm(z, weight, out=after_h)
        for _ in range(2):
            torch.mm(all_z.t(), all_x)  # gradients of both weights
        torch.mm(all_z, weight)  # and of the inputs

    def loop() -> None:
        core(x)[0].sum().backward()

    def timed(work: Callable[[], None]) -> Callable[[], float]:
        def once() -> float:
            began = now()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return now() - began

        return once

    return round(Case("", ">= 1", "s", in_turn(repetitions, timed(loop), timed(products))).ratio, 2)


def texts(folder: Path, num_tokens: int) -> DataSet:
    """Texts of different lengths, as reviews are: most are short, and some are ten times as long."""
    generator, num_rows = np.random.default_rng(0), num_tokens // 38  # words of a text, in the mean
    lengths = np.clip(generator.lognormal(3.4, 0.7, num_rows), 3, 300).astype(np.int64)
    words = generator.integers(0, WORDS, int(lengths.sum()), dtype=np.int32)
    rows: dict[str, Layout] = {
        "input": Ragged.of({"values": words}, lengths),
        "target": Dense(generator.integers(0, CLASSES, num_rows)),
    }
    return shards(folder, rows, {"input": Tokens(size=WORDS), "target": Label(size=CLASSES)})


def buckets(folder: Path, device: torch.device, tokens: int, repetitions: int) -> Iterator[Case]:
    """Epochs of texts in batches of like length against any."""
    data = texts(folder / "texts", tokens)
    for cell in ("lstm", "peephole_lstm"):
        with ExitStack() as stack:
            both = [
                trained(classifier(cell, bucket, data), data, folder / f"{cell}-{bucket}", stack, device)
                for bucket in (BUCKET, None)
            ]
            yield Case(f"{cell}, bucketed", ">= 1", "tokens/s", in_turn(repetitions, *both))


def padding(folder: Path, tokens: int) -> dict[str, float]:
    """The share of an epoch's steps that are padding, in batches of like length and in any."""
    data = texts(folder / "padding", tokens)
    splits, found = open_splits(data, window=None), {}
    for name, bucket in (("bucketed", BUCKET), ("not", None)):
        rows = splits.training(classifier("lstm", bucket, data), rank=0, world_size=1, device=torch.device("cpu"))
        given = [batch["input"] for (batch,) in rows.batches(0)]
        steps_of_all = sum(len(text.lengths) * text.longest for text in given)
        found[name] = round(1 - sum(len(text.values) for text in given) / steps_of_all, 3)
    return found


def main() -> None:
    chosen = options(__doc__, repetitions=5, tokens=50_000, threads=1, device="cpu")
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        skip("sequences", "torch finds no GPU here")
        return
    torch.set_num_threads(chosen.threads)
    with scratch() as folder:
        cases = list(cells(folder, device, chosen.tokens, chosen.repetitions))
        cases += buckets(folder, device, chosen.tokens, chosen.repetitions)
        shares = padding(folder, chosen.tokens)
        bounds = {name: bound(*size, device, chosen.repetitions) for name, size in SIZES.items()}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{chosen.threads} CPU threads"
    publish("sequences", cases, device=where, sizes=SIZES, bound=bounds, padding=shares, bucket=BUCKET)


if __name__ == "__main__":
    main()
