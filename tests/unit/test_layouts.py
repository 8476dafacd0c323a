"""Layouts: dense and ragged columns of rows against plain lists of rows, in memory, in Arrow and as models get them."""

import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.layouts import Dense, Ragged
from cluster.data.manifest import Manifest, StoredColumn
from cluster.data.rows import Rows, no_rows, table_rows
from cluster.data.shards import SPREAD, some_rows, write_shard
from cluster.storage import Folder
from nn_models.batch import Forest
from nn_models.batch import Ragged as RaggedBatch
from nn_models.columns import Column, Features, Image, Label, Labels, Numbers, Sequence, Tokens, Tree
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")
RAGGED = [Tokens(size=50), Labels(size=3), Sequence(width=2), Sequence(width=1), Tree(size=50)]
DENSE = {
    "images": StoredColumn(column=Image(shape=(3, 2, 2)), dtype="uint8"),
    "float images": StoredColumn(column=Image(shape=(1, 2, 2)), dtype="float32"),
    "features": StoredColumn(column=Features(size=3), dtype="float32"),
    "one feature": StoredColumn(column=Features(size=1), dtype="float32"),
    "byte features": StoredColumn(column=Features(size=3), dtype="uint8"),
    "label": StoredColumn(column=Label(size=9), dtype="int64"),
    "numbers": StoredColumn(column=Numbers(size=2), dtype="float32"),
    "tokens": StoredColumn(column=Tokens(size=9, length=4), dtype="int32"),
    "sequence": StoredColumn(column=Sequence(width=2, length=3), dtype="float32"),
}


def ragged(column: Column, lengths: list[int], seed: int) -> Ragged:
    """Random rows of these lengths; of trees, of as many leaves (and one at least)."""
    generator = np.random.default_rng(seed)
    if isinstance(column, Tree):
        leaves = np.maximum(1, np.array(lengths, int))
        return Ragged.of(made.trees(leaves, generator), 2 * leaves - 1)
    ((name, field),) = column.ragged_fields().items()
    return Ragged.of({name: generator.integers(0, 3, (sum(lengths), *field.shape)).astype(field.dtype)}, lengths)


def dense(stored: StoredColumn, rows: int, seed: int) -> Dense:
    shape = (rows, *stored.column.row_shape)
    return Dense(np.random.default_rng(seed).integers(0, 256, shape).astype(stored.dtype))


def rows_of(layout) -> list:
    """The rows as plain lists: of numbers, or of each field's elements."""
    if isinstance(layout, Dense):
        return layout.values.tolist()
    assert len(layout.offsets) == len(layout) + 1
    ends = layout.offsets.tolist()
    return [
        {name: values[first:end].tolist() for name, values in layout.fields.items()}
        for first, end in itertools.pairwise(ends)
    ]


@st.composite
def layouts(draw):
    """A column, and rows of it: some empty where rows differ in length, perhaps none at all."""
    seed = draw(st.integers(0, 99))
    if draw(st.booleans()):
        stored = draw(st.sampled_from(list(DENSE.values())))
        return stored, dense(stored, draw(st.integers(0, 8)), seed)
    stored = StoredColumn(column=draw(st.sampled_from(RAGGED)), moments=False)
    return stored, ragged(stored.column, draw(st.lists(st.integers(0, 5), max_size=8)), seed)


def manifest_of(stored: StoredColumn) -> Manifest:
    return Manifest(source="made", columns={"input": stored.model_copy(update={"moments": False})}, splits={})


# -- in memory -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(layouts(), st.data())
def test_taking_rows(case, data):
    _, layout = case
    rows, places = rows_of(layout), list(range(len(layout)))
    how = data.draw(st.sampled_from(["slice", "places", "mask"]))
    if how == "slice":
        bounds = st.integers(-9, 9) | st.none()
        where = slice(data.draw(bounds), data.draw(bounds))
        chosen = places[where]
    elif how == "places":
        chosen = data.draw(st.lists(st.sampled_from(places), max_size=12)) if places else []
        where = np.array(chosen, np.int64)
    else:
        mask = data.draw(st.lists(st.booleans(), min_size=len(places), max_size=len(places)))
        chosen, where = [place for place in places if mask[place]], np.array(mask, bool)
    taken = layout.take(where)
    assert rows_of(taken) == [rows[place] for place in chosen]
    assert len(taken) == len(chosen)
    if taken.lengths is not None:
        assert taken.lengths.dtype == np.int32
        assert taken.lengths.tolist() == [len(next(iter(rows[place].values()))) for place in chosen]


@settings(max_examples=100)
@given(layouts(), st.lists(st.integers(0, 8), max_size=4))
def test_joining_rows(case, cuts):
    _, layout = case
    parts = [layout.take(slice(first, end)) for first, end in zip([0, *sorted(cuts)], [*sorted(cuts), 8], strict=True)]
    joined = parts[0].joined(parts[1:])
    assert rows_of(joined) == rows_of(layout)
    assert joined.nbytes == layout.nbytes


@settings(max_examples=50)
@given(layouts(), layouts(), st.data())
def test_rows_are_their_columns(case, other, data):
    num = min(len(case[1]), len(other[1]))
    rows = Rows(np.arange(10, 10 + num), {"a": case[1].take(slice(num)), "b": other[1].take(slice(num))})
    chosen = np.array(data.draw(st.lists(st.integers(0, num - 1), max_size=9)) if num else [], np.int64)
    taken = rows.at(chosen)
    assert taken.ids.tolist() == (10 + chosen).tolist()
    for name, layout in rows.columns.items():
        assert rows_of(taken.columns[name]) == [rows_of(layout)[place] for place in chosen]
    joined = Rows.joined([rows, taken, rows.at(slice(0))])
    assert joined.ids.tolist() == [*rows.ids.tolist(), *taken.ids.tolist()]
    for name, layout in joined.columns.items():
        assert rows_of(layout) == rows_of(rows.columns[name]) + rows_of(taken.columns[name])


def test_bytes_of_rows():
    assert Dense(np.zeros((5, 3), np.float32)).nbytes == 60
    assert Ragged.of({"values": np.zeros((7, 2), np.float32)}, [3, 4]).nbytes == 7 * 2 * 4 + 3 * 8


# -- in Arrow --------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(layouts(), st.integers(1, 5), st.booleans())
def test_through_parquet_and_back(case, row_group_size, combined):
    stored, layout = case
    table = Rows(np.arange(len(layout)), {"input": layout}).to_arrow()
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=row_group_size, store_schema=True)
    parquet = pq.ParquetFile(io.BytesIO(file.getvalue()))
    # pieces of their own, as several shards give
    pieces = [parquet.read_row_group(index) for index in range(parquet.num_row_groups)]
    read = pa.concat_tables(pieces) if pieces else parquet.read()
    assert read.schema.equals(table.schema)
    rows = table_rows(read.combine_chunks() if combined else read, manifest_of(stored))
    found = rows.columns["input"]
    assert rows.ids.tolist() == list(range(len(layout)))
    assert rows_of(found) == rows_of(layout)
    if isinstance(layout, Dense):
        assert (found.values.dtype, found.values.shape) == (layout.values.dtype, layout.values.shape)
    else:
        described = stored.column.ragged_fields()
        assert list(found.fields) == list(layout.fields) == list(described)
        for name, field in described.items():
            assert (found.fields[name].dtype, found.fields[name].shape[1:]) == (field.dtype, field.shape)


@settings(max_examples=50)
@given(layouts())
def test_no_rows_are_of_the_same_kind(case):
    stored, layout = case
    none = no_rows(manifest_of(stored))
    assert (len(none.ids), len(none.columns["input"])) == (0, 0)
    assert rows_of(none.columns["input"].joined([layout])) == rows_of(layout)
    assert none.to_arrow().schema.equals(Rows(np.arange(len(layout)), {"input": layout}).to_arrow().schema)


@pytest.mark.parametrize("stored", [*DENSE.values(), *(StoredColumn(column=column) for column in RAGGED)], ids=str)
def test_rows_in_one_chunk_are_not_copied(stored):
    layout = dense(stored, 5, 0) if stored.column.layout == "dense" else ragged(stored.column, [3, 0, 1, 4, 2], 0)
    table = Rows(np.arange(5), {"input": layout}).to_arrow()
    found = table_rows(table, manifest_of(stored)).columns["input"]
    pairs = [(found.values, layout.values)] if isinstance(found, Dense) else [
        (found.fields[name], layout.fields[name]) for name in layout.fields
    ]  # fmt: skip
    for ours, theirs in pairs:
        assert np.shares_memory(ours, theirs)


# -- as models get them ----------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.sampled_from([column for column in RAGGED if not isinstance(column, Tree)]), st.data())
def test_a_ragged_batch(column, data):
    lengths = data.draw(st.lists(st.integers(0, 5), max_size=8))
    layout = ragged(column, lengths, 0)
    (name,) = layout.fields
    rows = [row[name] for row in rows_of(layout)]
    batch = layout.collate(column, CPU)
    assert batch.lengths.tolist() == lengths
    assert batch.longest == max(lengths, default=0)
    assert batch.values.tolist() == [element for row in rows for element in row]
    assert batch.mask().tolist() == [[place < length for place in range(batch.longest)] for length in lengths]
    assert batch.rows().tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    fill = [-1.0] * column.width if isinstance(column, Sequence) else -1
    wanted = [row + [fill] * (batch.longest - len(row)) for row in rows]
    padded = batch.padded(-1)
    assert padded.shape == (len(rows), batch.longest, *column.element_shape)
    assert padded.dtype == batch.values.dtype
    assert padded.tolist() == wanted
    flat = padded.flatten(0, 1)
    assert torch.equal(flat[batch.places()], batch.values)
    assert torch.equal(padded[batch.mask()], batch.values)
    assert torch.equal(batch.padded().flatten(0, 1)[batch.places()], batch.values)  # filled with zeros by default
    moved = batch.to(CPU)
    assert torch.equal(moved.values, batch.values)


def test_a_ragged_batch_carries_gradients():
    values = torch.randn(6, 2, generator=torch.manual_seed(0), requires_grad=True)
    batch = RaggedBatch(values, torch.tensor([1, 0, 5]), 5)
    (batch.padded()[batch.mask()] * torch.arange(12.0).reshape(6, 2)).sum().backward()
    assert torch.equal(values.grad, torch.arange(12.0).reshape(6, 2))


@pytest.mark.parametrize("stored", DENSE.values(), ids=DENSE)
def test_a_dense_batch(stored):
    layout = dense(stored, 4, 0)
    batch = layout.collate(stored.column, CPU)
    assert batch.numpy().dtype == stored.dtype
    np.testing.assert_array_equal(batch.numpy(), layout.values)


# -- trees -----------------------------------------------------------------------------------------------------------


def any_tree(arity: int, nodes: int, generator: np.random.Generator) -> tuple[list[int], list[list[int]], list[int]]:
    """Words, children and level of a tree whose nodes may have fewer children than `arity`, in random places.

    Children come before their parents; besides that nodes are in any order, so the root is last.
    """
    parents: dict[int, int | None] = {}

    def grow(size: int, parent: int | None) -> None:
        node = len(parents)
        parents[node] = parent
        num = int(generator.integers(1, min(arity, size - 1) + 1)) if size > 1 else 0
        cuts = sorted(generator.choice(np.arange(1, size - 1), num - 1, replace=False).tolist()) if num > 1 else []
        for first, end in itertools.pairwise([0, *cuts, size - 1] if num else [0]):
            grow(end - first, node)

    grow(nodes, None)
    order: list[int] = []  # the nodes as they stand: any whose children all stand before it comes next
    while len(order) < nodes:
        waiting = {parent for child, parent in parents.items() if child not in order}
        order.append(int(generator.choice([node for node in parents if node not in {*waiting, *order}])))
    children = [[-1] * arity for _ in range(nodes)]
    for child, parent in parents.items():
        if parent is not None:
            places = children[order.index(parent)]
            free = [place for place, taken in enumerate(places) if taken < 0]
            places[int(generator.choice(free))] = order.index(child)
    level: list[int] = []
    for below in children:
        level.append(1 + max((level[child] for child in below if child >= 0), default=-1))
    words = [int(generator.integers(50)) if not height else -1 for height in level]
    return words, children, level


def value_of(node: int, words: list[int], children: list[list[int]]) -> float:
    """A number that tells every tree from every other: it depends on each word and on where it stands."""
    below = [value_of(child, words, children) for child in children[node] if child >= 0]
    places = [place for place, child in enumerate(children[node]) if child >= 0]
    return float(np.cos(words[node] + sum((place + 1.7) * value for place, value in zip(places, below, strict=True))))


def values_of(forest: Forest) -> torch.Tensor:
    """The same of all nodes, level after level."""
    found = torch.zeros(len(forest.words), dtype=torch.float64)
    for first, end in zip(forest.levels, [*forest.levels[1:], len(forest.words)], strict=True):
        below = forest.children[first:end]
        assert (below < first).all()  # all children stand in levels before
        weights = torch.where(below < 0, 0, torch.arange(below.shape[1], dtype=torch.float64) + 1.7)
        found[first:end] = torch.cos(forest.words[first:end] + (weights * found[below.clamp(min=0)]).sum(1))
    return found


@settings(max_examples=100)
@given(st.integers(1, 4), st.lists(st.integers(1, 9), max_size=6), st.integers(0, 99))
def test_a_forest_is_its_trees_node_by_node(arity, sizes, seed):
    generator = np.random.default_rng(seed)
    trees = [any_tree(arity, nodes, generator) for nodes in sizes]
    words, children, level = ([item for tree in trees for item in tree[part]] for part in range(3))
    fields = {
        "words": np.array(words, np.int32),
        "children": np.array(children, np.int32).reshape(-1, arity),
        "level": np.array(level, np.int32),
    }
    forest = Ragged.of(fields, sizes).collate(Tree(size=50, arity=arity), CPU)
    assert len(forest.words) == sum(sizes)
    assert list(forest.levels) == sorted(forest.levels)
    assert forest.levels[0] == 0
    assert len(forest.levels) == 1 + max(level, default=0)
    assert forest.words.dtype == forest.children.dtype == torch.int64
    found = values_of(forest)
    # float64, nine nodes deep: the same sums, added up in another order
    assert found[forest.roots].tolist() == pytest.approx([value_of(len(t[0]) - 1, *t[:2]) for t in trees], abs=1e-12)
    # a label for each node stands where the node stood: `places` finds it
    wanted = [value_of(node, *tree[:2]) for tree in trees for node in range(len(tree[0]))]
    in_order = torch.zeros_like(found).index_copy(0, forest.places, found)
    assert in_order.tolist() == pytest.approx(wanted, abs=1e-12)  # the same
    assert torch.equal(forest.to(CPU).children, forest.children)


def test_trees_that_are_taken_and_joined_stay_whole():
    layout = ragged(Tree(size=50), [3, 1, 5, 2], 0)
    whole = values_of(layout.collate(Tree(size=50), CPU))[layout.collate(Tree(size=50), CPU).roots]
    taken = layout.take(np.array([2, 0, 2])).joined([layout.take(slice(3, 4))])
    forest = taken.collate(Tree(size=50), CPU)
    # float64; a level is computed at once, so the order of additions is the same
    torch.testing.assert_close(values_of(forest)[forest.roots], whole[[2, 0, 2, 3]], rtol=0, atol=1e-12)


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Rows of every ragged kind in several shards and row groups; as they are made, and as they are stored."""
    spec = made.ragged(700)
    return spec.open().rows, made.written(spec, tmp_path_factory.mktemp("ragged"))


def test_ragged_columns_through_shards(stored):
    given, data = stored
    seen = []
    for split in ("train", "validation", "test"):
        held, streamed = made.split_rows(data, split), data.read_row_groups(data.row_group_locations(split))
        assert list(held.columns) == list(made.RAGGED)
        for name in held.columns:
            assert rows_of(held.columns[name]) == rows_of(streamed.columns[name])
        assert held.ids.tolist() == streamed.ids.tolist() == list(range(data.manifest.rows(split)))
        for name in ("input", "steps", "marks", "tree"):
            lengths = data.lengths(split, name)
            assert lengths.dtype == np.int32
            assert lengths.tolist() == held.columns[name].lengths.tolist()
        seen += [rows_of(layout) for layout in [Rows(held.ids, held.columns)] for layout in layout.columns.values()]
    # every row is there once, its columns still beside each other
    names = list(made.RAGGED)
    found = [repr(row) for part in range(3) for row in zip(*seen[part * len(names) :][: len(names)], strict=True)]
    assert sorted(found) == sorted(repr(row) for row in zip(*(rows_of(given[name]) for name in names), strict=True))
    assert data.table("train").column_names == [
        "row", "input.values", "input.length", "target", "steps.values", "steps.length", "marks.values",
        "marks.length", "tree.words", "tree.children", "tree.level", "tree.length",
    ]  # fmt: skip
    data.verify()


def test_some_rows_of_ragged_columns(stored):
    _, data = stored
    rows = some_rows(data, "train", 50)
    whole = made.split_rows(data, "train")
    assert len(data.row_group_locations("train")) < SPREAD  # so all of them may be read
    assert len(set(rows.ids.tolist())) == 50
    for name, layout in rows.columns.items():
        assert rows_of(layout) == rows_of(whole.columns[name].take(rows.ids))


def test_row_groups_of_long_rows_hold_few(tmp_path):
    column = Sequence(width=64)
    lengths = np.full(200, 500)
    rows = Rows(np.arange(200), {"input": Ragged.of({"values": np.zeros((100_000, 64), np.float32)}, lengths)})
    shard = write_shard(Folder(tmp_path), "a.parquet", rows, {"input": StoredColumn(column=column)})
    assert max(shard.row_groups) == (2 << 20) // (500 * 64 * 4 + 8)  # two MiB, and eight bytes of a row's offset
