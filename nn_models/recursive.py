"""Recursive nets over trees: recursive, RNTN, binary and Child-Sum Tree-LSTM, with a classifier on their nodes.

All trees of a batch are computed together, level by level (see `recursion.py`).

Shapes: B trees of the batch, N nodes of all trees, the leaves first, D numbers of a word, H units, K outputs.
"""

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from nn_models.activations import initialise
from nn_models.batch import Forest
from nn_models.columns import Label, Labels, Numbers, Tree
from nn_models.errors import UserError
from nn_models.model import reading
from nn_models.recursion import LSTMOfPairs, LSTMOfSums, Nodes, TanhOfPairs
from nn_models.signature import Signature
from nn_models.word_vectors import WordVectorsSpec


class WordVectors(nn.Embedding):
    """A vector for each known word, and one, the last, for all others: `scale` times its weights.

    An optimizer that moves each weight by about its learning rate moves vectors so many times as fast.
    """

    def __init__(self, num_known: int, size: int, *, std: float, scale: float) -> None:
        """`std` is that of the first vectors' numbers."""
        super().__init__(num_known + 1, size)
        self.scale = scale
        nn.init.normal_(self.weight, 0.0, std / scale)

    def forward(self, words: Tensor) -> Tensor:
        """Words (n,), counted on past the known ones -> (n, D)."""
        return self.scale * super().forward(words.clamp(0, self.num_embeddings - 1))


class Cells(nn.Module):
    """Base of what makes states: the hidden states h (N, `size`) of all nodes of a forest."""

    size: int

    def forward(self, forest: Forest, vectors: WordVectors, dropout: nn.Module) -> Tensor:
        """(N, H) of a forest; dropout stands on the words' vectors."""
        raise NotImplementedError


class RecursiveCells(Cells):
    """p = tanh(W [c1; c2] + b), and leaves are their words' vectors (Socher et al. 2011, eq. 2)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        bound = 0.1 * size**-0.5
        # at first a parent is about the mean of its children
        mean = 0.5 * torch.eye(size).repeat(1, 2)
        self.weight = nn.Parameter(torch.empty(size, 2 * size).uniform_(-bound, bound) + mean)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, forest: Forest, vectors: WordVectors, dropout: nn.Module) -> Tensor:
        """See Cells."""
        return self.up(forest, dropout(vectors(_leaves(forest))))

    def up(self, forest: Nodes, leaves: Tensor, tensor: Tensor | None = None) -> Tensor:
        """(N, H) of the leaves' states."""
        return _without_autocast(TanhOfPairs, forest, leaves, self.weight, self.bias, tensor)


class TensorCells(RecursiveCells):
    """p_k = tanh([c1; c2]^T V_k [c1; c2] + (W [c1; c2] + b)_k), the neural tensor layer (Socher et al. 2013, eq. 3)."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        bound = 0.25 / size
        self.tensor = nn.Parameter(torch.empty(size, 2 * size, 2 * size).uniform_(-bound, bound))

    def forward(self, forest: Forest, vectors: WordVectors, dropout: nn.Module) -> Tensor:
        """See Cells."""
        return self.up(forest, dropout(vectors(_leaves(forest))), self.tensor)


class BinaryLSTMCells(Cells):
    """The binary Tree-LSTM (Tai et al. 2015, eq. 9-14), with words at the leaves and none above.

        leaves:  c = W x + b             o = sigmoid(W x + b)
        above:   i, o, f1, f2 = sigmoid(U1 h1 + b1 + U2 h2 + b2)    u = tanh(U1 h1 + b1 + U2 h2 + b2)
                 c = i u + f1 c1 + f2 c2
        h = o tanh(c)

    As in the authors' code, leaves have matrices of their own, and the products of both children a bias each.
    """

    def __init__(self, num_inputs: int, size: int, *, forget_bias: float) -> None:
        super().__init__()
        self.size = size
        self.leaf = nn.Linear(num_inputs, 2 * size)  # o, c
        initialise(self.leaf, activation=None)
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(5 * size, 2 * size).uniform_(-bound, bound))  # o, i, f1, f2, u
        self.left_bias, self.right_bias = (nn.Parameter(torch.zeros(5 * size)) for _ in range(2))
        with torch.no_grad():
            self.left_bias[2 * size : 4 * size] = forget_bias

    def forward(self, forest: Forest, vectors: WordVectors, dropout: nn.Module) -> Tensor:
        """See Cells."""
        o, c = self.leaf(dropout(vectors(_leaves(forest)))).chunk(2, 1)
        h = o.sigmoid() * c.tanh()
        return _without_autocast(LSTMOfPairs, forest, h, c, self.weight, self.left_bias + self.right_bias)


class ChildSumLSTMCells(Cells):
    """The Child-Sum Tree-LSTM (Tai et al. 2015, eq. 2-8): any number of children, in no order, words at any node.

        s = sum_k h_k        i, o = sigmoid(W x + U s + b)        u = tanh(W x + U s + b)
        f_k = sigmoid(W x + U h_k + b)
        c = i u + sum_k f_k c_k        h = o tanh(c)

    A node without a word has x = 0.
    """

    def __init__(self, num_inputs: int, size: int, *, forget_bias: float) -> None:
        super().__init__()
        self.size = size
        self.words = nn.Linear(num_inputs, 4 * size)  # i, o, u, f
        initialise(self.words, activation=None)
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(4 * size, size).uniform_(-bound, bound))
        with torch.no_grad():
            self.words.bias[3 * size :] = forget_bias

    def forward(self, forest: Forest, vectors: WordVectors, dropout: nn.Module) -> Tensor:
        """See Cells."""
        x = dropout(vectors(forest.words)).masked_fill((forest.words < 0)[:, None], 0)
        return _without_autocast(LSTMOfSums, forest, self.words(x), self.weight)


def _leaves(forest: Forest) -> Tensor:
    """The words of the leaves."""
    first, end = forest.spans()[0]
    return forest.words[first:end]


def _without_autocast(function: type[torch.autograd.Function], forest: Nodes, *values: Tensor | None) -> Tensor:
    """The function in the precision of the weights: its derivatives are written for buffers of one type."""
    kind = values[-1] if values[-1] is not None else values[-2]
    assert kind is not None
    kept = kind.device.type == "meta"  # where there is no autocast
    with nullcontext() if kept else torch.autocast(kind.device.type, enabled=False):
        same = [value if value is None else value.to(kind.dtype) for value in values]
        hidden: Tensor = function.apply(forest, *same)
        return hidden


class RecursiveNet(nn.Module):
    """Words' vectors, the states of all nodes from the leaves up, and a linear classifier on each node, or the root."""

    def __init__(
        self, vectors: WordVectors, cells: Cells, num_outputs: int, *, each_node: bool, dropout: float
    ) -> None:
        super().__init__()
        self.each_node = each_node
        self.embedding = vectors
        self.cells = cells
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(cells.size, num_outputs)
        initialise(self.output, activation=None)

    @torch.compiler.disable  # batches differ in their levels: each would be compiled anew
    def forward(self, forest: Forest) -> Tensor:
        """(B, K), or with labels of nodes (N, K), tree after tree as they are stored."""
        h = self.cells(forest, self.embedding, self.dropout)
        if not self.each_node:
            return self.output(self.dropout(h[forest.roots]))
        said = self.output(self.dropout(h))
        return said.new_empty(said.shape).index_copy(0, forest.places, said)


class _RecursiveSpec(WordVectorsSpec):
    """Base of the recursive nets' descriptions."""

    reads = reading(input=Tree)
    gives = frozenset({"row", "elements"})
    first_std: ClassVar[float] = 0.3  # of the vectors' first numbers: of 0.1 to 1, what reached most on the SST
    word_scale: PositiveFloat = Field(1.0, description="how many times as fast as other weights words' vectors move")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share dropped in training: of words' vectors, and of states before the output"
    )

    def check(self, signature: Signature) -> None:
        """See ModelSpec."""
        super().check(signature)
        target = signature["target"]
        if not isinstance(target, Label | Labels | Numbers):
            raise UserError("model.kind", f"{self.kind} predicts no {target.kind}", "choose another data set")

    def build(self, signature: Signature) -> RecursiveNet:
        """The module: trees -> (B, num_outputs), or for labels of nodes (N, num_outputs)."""
        column = signature["input"]
        assert isinstance(column, Tree)
        each_node = isinstance(signature["target"], Labels)
        cells = self._cells()
        vectors = WordVectors(column.num_known, self._num_inputs, std=self.first_std, scale=self.word_scale)
        net = RecursiveNet(vectors, cells, signature.num_outputs, each_node=each_node, dropout=self.dropout)
        self.settle(net)
        return net

    def take_vectors(self, model: Any, words: Tensor, vectors: Tensor) -> None:
        """See ModelSpec: what is read is `scale` times the weights."""
        super().take_vectors(model, words, vectors / model.embedding.scale)

    @property
    def _num_inputs(self) -> int:
        """Numbers of a word."""
        size: int = getattr(self, self.vector_size)
        return size

    def _cells(self) -> Cells:
        raise NotImplementedError


class _BinarySpec(_RecursiveSpec):
    """Base of those that read trees of two children a node, with words at the leaves."""

    def check(self, signature: Signature) -> None:
        """See _RecursiveSpec."""
        super().check(signature)
        column = signature["input"]
        assert isinstance(column, Tree)
        fix = "set model.kind to child_sum_tree_lstm"
        if column.arity > 2:
            raise UserError(
                "model.kind", f"{self.kind} reads binary trees, but nodes have up to {column.arity} children", fix
            )
        if column.words_at != "leaves":
            raise UserError("model.kind", f"{self.kind} reads words at the leaves, but other nodes have some too", fix)


class RecursiveSpec(_BinarySpec):
    """Recursive net: a node is tanh of one matrix times its children (Socher et al. 2011)."""

    vector_size = "hidden"
    first_std = 0.1
    kind: Literal["recursive"] = "recursive"
    hidden: PositiveInt = Field(30, description="numbers of each word and node")
    word_scale: PositiveFloat = Field(10.0, description="how many times as fast as other weights words' vectors move")

    def _cells(self) -> Cells:
        return RecursiveCells(self.hidden)


class RNTNSpec(RecursiveSpec):
    """Recursive neural tensor network: children multiply each other too (Socher et al. 2013)."""

    kind: Literal["rntn"] = "rntn"  # type: ignore[assignment]

    def _cells(self) -> Cells:
        return TensorCells(self.hidden)


class TreeLSTMSpec(_BinarySpec):
    """Binary Tree-LSTM: a forget gate for each of two children (Tai et al. 2015, eq. 9-14)."""

    kind: Literal["tree_lstm"] = "tree_lstm"
    hidden: PositiveInt = Field(150, description="units of each node")
    embedding: PositiveInt = Field(300, description="numbers that stand for a word")
    forget_bias: float = Field(1.0, description="first bias of the forget gates (Jozefowicz et al. 2015)")

    def _cells(self) -> Cells:
        return BinaryLSTMCells(self.embedding, self.hidden, forget_bias=self.forget_bias)


class ChildSumTreeLSTMSpec(_RecursiveSpec):
    """Child-Sum Tree-LSTM: nodes with any number of children (Tai et al. 2015, eq. 2-8)."""

    kind: Literal["child_sum_tree_lstm"] = "child_sum_tree_lstm"
    hidden: PositiveInt = Field(150, description="units of each node")
    embedding: PositiveInt = Field(300, description="numbers that stand for a word")
    forget_bias: float = Field(1.0, description="first bias of the forget gate (Jozefowicz et al. 2015)")

    def _cells(self) -> Cells:
        return ChildSumLSTMCells(self.embedding, self.hidden, forget_bias=self.forget_bias)
