"""Trees: trees and nodes a second in training, level by level, against the same net node by node in the same process.

The binary Tree-LSTM of the Stanford Sentiment Treebank (d = 300, h = 150; Tai et al. 2015) with a label at every node,
under Adagrad, on one thread, in seconds of that thread: what else the machine does takes nothing of them. Trees are
the treebank's where its folder is given (`MANTA_SST`), else random binary ones of the same mean and spread of lengths.
Also: how long a rank of two waits for the other, ranks cut by nodes and by trees.
"""

import os
import statistics
from collections.abc import Callable
from functools import partial
from time import process_time
from typing import Any

import numpy as np
import torch
from measuring import Case, options, publish
from torch import Tensor
from torch.nn import functional as F

from cluster.data.layouts import Ragged
from cluster.data.order import WholeOrder
from cluster.data.prepare import prepared
from cluster.data.rows import Rows, table_rows
from cluster.data.sources.treebank import SSTSpec
from cluster.recipe.loading import load_recipe
from cluster.training.gradients import touch_only_used_rows
from cluster.training.memory import keep_freed_memory
from nn_models import zoo
from nn_models.batch import Batch, Forest, Place
from nn_models.columns import Labels, Tree
from nn_models.recursive import RecursiveNet
from nn_models.signature import Signature

CPU = torch.device("cpu")
WORDS, CLASSES = 18_280, 5
MEAN_LEAVES, SPREAD = 19.1, 9.3  # of the treebank's training trees
RECIPE: dict[str, Any] = {
    "model": {"kind": "tree_lstm", "hidden": 150, "embedding": 300},
    "data": {"kind": "sst", "path": "sst"},
    "objective": {"kind": "node_labels"},
    "optimizer": {"kind": "adagrad", "lr": 0.05},
}


def random_trees(num: int) -> Rows:
    """Binary trees: neighbours are joined in random order, as many as the treebank's have leaves."""
    generator = np.random.default_rng(0)
    leaves = np.clip(np.rint(generator.gamma((MEAN_LEAVES / SPREAD) ** 2, SPREAD**2 / MEAN_LEAVES, num)), 1, 52)
    words: list[int] = []
    children: list[tuple[int, int]] = []
    level: list[int] = []
    for count in leaves.astype(int).tolist():
        heights = [0] * count
        words += (WORDS * generator.random(count) ** 4).astype(int).tolist() + [-1] * (count - 1)
        children += [(-1, -1)] * count
        open_ = list(range(count))
        while len(open_) > 1:
            at = int(generator.integers(len(open_) - 1))
            left, right = open_[at], open_.pop(at + 1)
            children.append((left, right))
            heights.append(1 + max(heights[left], heights[right]))
            open_[at] = len(heights) - 1
        level += heights
    lengths = 2 * leaves.astype(int) - 1
    fields = {"words": np.array(words, np.int32), "children": np.array(children, np.int32).reshape(-1, 2)}
    fields["level"] = np.array(level, np.int32)
    labels = generator.integers(0, CLASSES, len(words)).astype(np.int32)
    return Rows(np.arange(num), {"input": Ragged.of(fields, lengths), "target": Ragged.of({"values": labels}, lengths)})


class Training:
    """The net, its optimizer, and steps on batches."""

    def __init__(self, rows: Rows, signature: Signature) -> None:
        recipe = load_recipe(RECIPE)
        torch.manual_seed(0)
        model = zoo.build(recipe.model, signature)
        assert isinstance(model, RecursiveNet)
        self.model, self.rows, self.signature = model, rows, signature
        touch_only_used_rows(model, recipe, device=CPU)
        self.optimizer = recipe.optimizer.build(model.parameters())
        self.objective: Any = recipe.objective.build(signature)

    def batch(self, ids: np.ndarray) -> Batch:
        """As the loader lays it together."""
        columns = {
            name: layout.take(ids).collate(self.signature[name], CPU) for name, layout in self.rows.columns.items()
        }
        return Batch(columns, Place.of(len(ids)), lambda: torch.empty(0))

    def step(self, ids: np.ndarray, net: Callable[[Forest], Tensor]) -> None:
        """One, the batch's layout included."""
        batch = self.batch(ids)
        self.optimizer.zero_grad()
        loss = self.objective.measure(net, batch).loss / len(batch["input"].words)
        loss.backward()
        self.optimizer.step()

    def rate(self, ids: np.ndarray, net: Callable[[Forest], Tensor], *, batch: int) -> float:
        """Trees a second over these rows."""
        began = process_time()
        for first in range(0, len(ids), batch):
            self.step(ids[first : first + batch], net)
        return len(ids) / (process_time() - began)

    def node_by_node(self, forest: Forest, *, products: int = 5) -> Tensor:
        """The same outputs node by node; only words' vectors are looked up at once.

        A node's gates come of a product each, as the equations are written, or of one together.
        """
        cells: Any = self.model.cells
        bias = cells.left_bias + cells.right_bias
        gates = list(zip(cells.weight.chunk(products), bias.chunk(products), strict=True))
        stored = forest.stored()
        words, children = stored["words"].tolist(), stored["children"].tolist()
        vectors = self.model.embedding(stored["words"].clamp(min=0).long())
        outputs: list[Tensor] = []
        first = 0
        for length in forest.lengths.tolist():
            states: list[tuple[Tensor, Tensor]] = []
            for node in range(first, first + length):
                if words[node] >= 0:
                    o, c = cells.leaf(vectors[node]).chunk(2)
                else:
                    (h1, c1), (h2, c2) = (states[child] for child in children[node])
                    both = torch.cat((h1, h2))
                    sums = [F.linear(both, matrix, offset) for matrix, offset in gates]
                    o, i, f1, f2, u = sums if products == 5 else sums[0].chunk(5)
                    c = i.sigmoid() * u.tanh() + f1.sigmoid() * c1 + f2.sigmoid() * c2
                h = o.sigmoid() * c.tanh()
                states.append((h, c))
                outputs.append(self.model.output(h))
            first += length
        return torch.stack(outputs)


def check_equal(training: Training, ids: np.ndarray) -> None:
    """Both compute the same."""
    forest = training.batch(ids)["input"]
    torch.testing.assert_close(training.model(forest), training.node_by_node(forest), atol=1e-5, rtol=1e-4)


def idle_share(training: Training, *, batch: int, by_nodes: bool) -> float:
    """How much of its time a rank of two waits for the other, on average: 1 - mean / slowest, both measured here."""
    lengths = training.rows.columns["input"].lengths
    order = WholeOrder(len(training.rows.ids), global_batch_size=batch, seed=1, work=lengths if by_nodes else None)
    waited = slowest = 0.0
    for step in range(min(order.num_steps, max(8, 1500 // batch))):
        times = []
        for rank in range(2):
            ids = order.rows(0, step, rank, 2)
            if not len(ids):
                times.append(0.0)
                continue
            tries = []
            for _ in range(3):  # what disturbs the machine does not disturb all of them
                began = process_time()
                training.step(ids, training.model)
                tries.append(process_time() - began)
            times.append(min(tries))
        slowest += max(times)
        waited += max(times) - statistics.mean(times)
    return waited / slowest


def main() -> None:
    chosen = options(__doc__, repetitions=3, trees=1024)
    torch.set_num_threads(1)
    keep_freed_memory(CPU)
    if folder := os.environ.get("MANTA_SST"):
        data = prepared(SSTSpec(path=folder))
        rows, signature = table_rows(data.table("train"), data.manifest), data.manifest.signature
    else:
        rows = random_trees(4096)
        signature = Signature(columns={"input": Tree(size=WORDS), "target": Labels(size=CLASSES)})
    training = Training(rows, signature)
    ids = np.random.default_rng(0).permutation(len(rows.ids))[: chosen.trees]
    nodes = float(rows.columns["input"].take(ids).lengths.mean())
    check_equal(training, ids[:8])
    few = ids[: max(25, len(ids) // 16)]
    cases, rates = [], {}
    # in one product a node's gates are bound by memory as those of a batch of 25 are by arithmetic: 0.9 GFLOP a step
    others = {"a product a gate": 5, "one product": 1}
    for batch in (25, 256):
        training.rate(few, training.model, batch=batch)  # a first one that does not count
        measured: list[float] = []
        for what, products in others.items():
            recursion = partial(training.node_by_node, products=products)
            pairs = []
            for _ in range(chosen.repetitions):
                ours = training.rate(ids, training.model, batch=batch)
                pairs.append((ours, training.rate(few, recursion, batch=batch)))
            cases.append(Case(f"node by node, {what}, batch {batch}", ">= 15", "trees/s", pairs))
            measured += [ours for ours, _ in pairs]
        rates[f"trees_per_s_{batch}"] = round(statistics.median(measured), 1)
        rates[f"nodes_per_s_{batch}"] = round(rates[f"trees_per_s_{batch}"] * nodes)
    cases.append(Case("700 trees/s, batch 25", ">= 1", "trees/s", [(ours, 700.0) for ours, _ in cases[0].pairs]))
    idle = {
        f"idle_{batch}_by_{what}": round(idle_share(training, batch=batch, by_nodes=what == "nodes"), 4)
        for batch in (25, 256)
        for what in ("nodes", "trees")
    }
    cases.append(Case("share of waiting, two ranks, batch 256", "<= 0.05", "share", [(idle["idle_256_by_nodes"], 1.0)]))
    publish("trees", cases, trees="sst" if folder else "random", nodes_per_tree=round(nodes, 1), **rates, **idle)


if __name__ == "__main__":
    main()
