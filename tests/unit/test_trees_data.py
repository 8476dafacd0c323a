"""Trees from files: the sentiment treebank's format, brackets, nested lists, heads; and what is said of bad ones."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.layouts import Ragged
from cluster.data.prepare import prepared
from cluster.data.shards import DataSet
from cluster.data.sources.base import DataSpec
from cluster.data.sources.flat_trees import of_brackets, of_lists, spelled
from cluster.data.sources.listops import ListOpsSpec
from cluster.data.sources.treebank import SSTSpec
from cluster.data.sources.trees import TreesSpec
from jobs.commands.printing import print_manifest
from nn_models.errors import UserError
from tests.unit import made

TRAIN = [
    "(3 (2 It) (4 (2 's) (4 great)))",
    "(1 (2 (2 It) (2 's)) (0 (1 not) (3 great)))",
    "(2 1\N{NO-BREAK SPACE}1/2)",  # one token, as the treebank has them
    "(4 (4 great) (2 .))",
]
DEV = ["(0 (1 not) (2 (2 a) (2 movie)))"]
TEST = ["(3 (2 A) (3 (3 great) (2 movie)))", "(2 It)"]


def sst(folder: Path, *, train=TRAIN, dev=DEV, test=TEST, ending="\n", **fields) -> SSTSpec:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("train", train), ("dev", dev), ("test", test)):
        (folder / f"{name}.txt").write_bytes("".join(line + ending for line in lines).encode())
    return SSTSpec(path=str(folder), **fields)


def refusal(spec: DataSpec) -> str:
    with pytest.raises(UserError) as caught:
        prepared(spec)
    return str(caught.value)


def spelled_rows(data: DataSet, split: str) -> list[str]:
    """The trees of a split in brackets, from the stored columns."""
    rows = made.split_rows(data, split).columns
    names, trees = data.manifest.columns["input"].column.names, rows["input"]
    found = []
    for first, end in zip(trees.offsets[:-1], trees.offsets[1:], strict=True):
        words = [names[word] if word >= 0 else None for word in trees.fields["words"][first:end].tolist()]
        target = rows["target"]
        labels = target.fields["values"][first:end].tolist() if isinstance(target, Ragged) else None
        found.append(spelled(words, trees.fields["children"][first:end].tolist(), labels))
    return found


# -- the treebank --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_every_line_can_be_spelled_again_from_the_stored_columns(tmp_path, ending):
    data = prepared(sst(tmp_path, ending=ending))
    for split, lines in (("train", TRAIN), ("validation", DEV), ("test", TEST)):
        assert spelled_rows(data, split) == lines


GRADES, TOKEN = st.sampled_from("01234"), st.text("ab\N{NO-BREAK SPACE}'/-\\[]\N{GREEK SMALL LETTER ALPHA}", min_size=1)
SENTENCE = st.recursive(
    st.builds("({} {})".format, GRADES, TOKEN), lambda tree: st.builds("({} {} {})".format, GRADES, tree, tree)
)


@settings(max_examples=20, deadline=None)
@given(st.lists(SENTENCE, min_size=2, max_size=5), st.lists(SENTENCE, min_size=1, max_size=3), st.integers(1, 3))
def test_any_lines_can_be_spelled_again(tmp_path_factory, train, test, min_count):
    data = prepared(sst(tmp_path_factory.mktemp("sst"), train=train, test=test, min_count=min_count))
    assert spelled_rows(data, "train") == train
    assert spelled_rows(data, "test") == test


def test_columns_of_the_treebank(tmp_path):
    data = prepared(sst(tmp_path))
    tree, labels = (data.manifest.signature[name] for name in ("input", "target"))
    assert (tree.arity, tree.words_at, labels.of) == (2, "leaves", "input")
    assert labels.names == ("very negative", "negative", "neutral", "positive", "very positive")
    # words of the training trees by their number, then those that only others have
    assert tree.names[:3] == ("great", "'s", "It")
    assert (tree.known, tree.names[tree.known :]) == (6, ("A", "a", "movie"))
    rows = made.split_rows(data, "train").columns["input"]
    assert rows.lengths.tolist() == [5, 7, 1, 3]
    assert rows.fields["level"].tolist() == [0, 0, 0, 1, 2, 0, 0, 1, 0, 0, 1, 2, 0, 0, 0, 1]
    assert rows.fields["children"][4].tolist() == [0, 3]


def test_three_grades_without_neutral_sentences(tmp_path):
    data = prepared(sst(tmp_path, grades=3))
    assert data.manifest.signature["target"].names == ("negative", "neutral", "positive")
    assert spelled_rows(data, "train") == [
        "(2 (1 It) (2 (1 's) (2 great)))",
        "(0 (1 (1 It) (1 's)) (0 (0 not) (2 great)))",
        "(2 (2 great) (1 .))",
    ]
    assert spelled_rows(data, "test") == ["(2 (1 A) (2 (2 great) (1 movie)))"]


def test_seldom_words_are_unknown(tmp_path):
    tree = prepared(sst(tmp_path, min_count=2)).manifest.signature["input"]
    assert (tree.known, tree.size) == (3, 9)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("(3 (2 It) (4 works)", "line 2, column 1: a bracket is opened and not closed"),
        ("(3 (2 It (4 works))", "line 2, column 10: a bracket where 'It' stands alone"),
        ("(3 (2 It) (4 works)))", "line 2, column 21: ')' after the end of the tree"),
        (")", "line 2, column 1: a bracket is closed that was not opened"),
        ("(3 (2 It) (5 works))", "line 2, column 12: the label '5' is none of 0 to 4"),
        ("(3 (2 It) (+1 works))", "line 2, column 12: the label '+1' is none of 0 to 4"),
        ("()", "line 2, column 1: an empty node"),
        ("(3)", "line 2, column 1: a node without a word or children"),
        ("(3 ((2 It) (4 works)))", "line 2, column 5: a bracket where the node above has no label"),
        ("(3 It works)", "line 2, column 7: 'works' is a second word or child of a leaf"),
        ("It works", "line 2, column 1: 'It' outside of any bracket"),
        ("(3 (2 It) (2 (2 a)) )", "line 2, column 11: a node of 1 child, where trees are binary"),
        ("(3 (2 It) (2 a) (2 b))", "line 2, column 1: a node of 3 children, where trees are binary"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_place(tmp_path, line, said):
    message = refusal(sst(tmp_path, dev=[DEV[0], line]))
    assert message.startswith(f"{tmp_path}/dev.txt, {said}")
    assert message.endswith("; mend the line, or take it out")


def test_all_bad_lines_of_a_file_are_named(tmp_path):
    said = refusal(sst(tmp_path, train=["(3", *TRAIN, "(7 x)"], test=[*TEST, "(2"])).splitlines()
    places = ("train.txt, line 1, column 1", "train.txt, line 6, column 2", "test.txt, line 3, column 1")
    assert [line.split(": ")[0] for line in said] == [f"{tmp_path}/{place}" for place in places]


def test_files_that_are_not_there_or_hold_nothing(tmp_path):
    assert "has no train.txt; set data.path to the folder" in refusal(SSTSpec(path=str(tmp_path)))
    assert refusal(sst(tmp_path, test=[])).endswith("no trees in there; give a file that has some")
    sst(tmp_path)
    (tmp_path / "dev.txt").write_bytes(b"(2 \xff)")
    assert "no UTF-8 text (byte 3)" in refusal(SSTSpec(path=str(tmp_path)))


def test_a_tree_deeper_than_pythons_recursion_limit(tmp_path):
    depth = 3 * sys.getrecursionlimit()
    line = "(2 (2 a) " * depth + "(3 b)" + ")" * depth
    data = prepared(sst(tmp_path, train=[*TRAIN, line]))
    assert spelled_rows(data, "train")[-1] == line
    assert made.split_rows(data, "train").columns["input"].fields["level"].max() == depth


# -- brackets, nested lists ----------------------------------------------------------------------------------------

WORD = st.text(st.characters(exclude_characters="() ", exclude_categories=("Cs",)), min_size=1, max_size=4)
LABELLED = st.recursive(
    st.tuples(WORD, WORD).map(list),
    lambda tree: st.tuples(WORD, st.lists(tree, min_size=1, max_size=4)).map(lambda found: [found[0], *found[1]]),
    max_leaves=12,
)
PLAIN = st.recursive(WORD, lambda tree: st.lists(tree, min_size=2, max_size=4), max_leaves=12)


def in_brackets(tree) -> str:
    return f"({' '.join(map(in_brackets, tree))})" if isinstance(tree, list) else tree


@given(LABELLED)
def test_labelled_trees_are_read_from_brackets_and_lists_and_spelled_again(tree):
    read = of_brackets(in_brackets(tree), labelled=True, where="")
    assert read == of_lists(json.dumps(tree), labelled=True, where="")
    assert spelled(*read) == in_brackets(tree)


@given(PLAIN)
def test_plain_trees_are_read_from_brackets_and_lists_and_spelled_again(tree):
    read = of_brackets(in_brackets(tree), labelled=False, where="")
    if isinstance(tree, list):
        assert read == of_lists(json.dumps(tree), labelled=False, where="")
    assert spelled(read.words, read.children) == in_brackets(tree)
    assert read.levels()[-1] == max(read.levels())


def test_brackets_around_one_node_say_nothing():
    assert of_brackets("((a) (b c))", labelled=False, where="") == of_brackets("(a (b c))", labelled=False, where="")


# -- the user's own files ------------------------------------------------------------------------------------------


def lines_of(folder: Path, rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_rows(spec: TreesSpec):
    """(trees in brackets, labels, tree column) of all splits."""
    data = prepared(spec)
    trees = [tree for split in data.manifest.splits for tree in spelled_rows(data, split)]
    labels = [made.split_rows(data, split).columns["target"] for split in data.manifest.splits]
    return trees, labels, data.manifest.signature


ONE = {"validation_fraction": 0.0, "test_fraction": 0.0}
NESTED = [[["a", "b"], "c"], ["d", ["a", "e", "f"]]]


def test_trees_with_a_label_from_lists_brackets_and_parquet(tmp_path):
    rows = [
        {"tree": tree, "mood": mood, "note": [[1, 2], {"x": 3}]}
        for tree, mood in zip(NESTED, ("good", "bad"), strict=True)
    ]
    found = all_rows(TreesSpec(path=lines_of(tmp_path, rows), target="mood", **ONE))
    assert found[0] == ["((a b) c)", "(d (a e f))"]
    assert found[1][0].values.tolist() == [1, 0]
    assert (found[2]["target"].names, found[2]["input"].arity) == (("bad", "good"), 3)
    as_text = [{**row, "tree": text} for row, text in zip(rows, found[0], strict=True)]
    assert all_rows(TreesSpec(path=lines_of(tmp_path, as_text), target="mood", **ONE))[0] == found[0]
    table = pa.table({"tree": [json.dumps(NESTED[0]), found[0][1]], "mood": [1, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    again = all_rows(TreesSpec(path=str(tmp_path / "rows.parquet"), target="mood", **ONE))
    assert again[0] == found[0]
    assert again[2]["target"].names == ("0", "1", "2", "3")


def test_trees_whose_nodes_have_labels(tmp_path):
    (tmp_path / "trees.txt").write_text("(S (NP John) (VP (V runs)))\n\n(NP (D the) (N dog) (N house))\n")
    _, labels, signature = all_rows(TreesSpec(path=str(tmp_path / "trees.txt"), **ONE))
    names = signature["target"].names
    assert [names[label] for label in labels[0].fields["values"]] == ["NP", "V", "VP", "S", "D", "N", "N", "NP"]
    assert signature["input"].names == ("John", "dog", "house", "runs", "the")


def test_splits_of_their_own(tmp_path):
    for name, tree in (("a", "(1 (0 x) (1 y))"), ("b", "(0 z)"), ("c", "(1 (1 x) (0 w))")):
        (tmp_path / f"{name}.txt").write_text(f"{tree}\n")
    paths = {"path": "a", "validation_path": "b", "test_path": "c"}
    data = prepared(TreesSpec(**{field: str(tmp_path / f"{name}.txt") for field, name in paths.items()}))
    assert {split: spelled_rows(data, split)[0][:4] for split in ("train", "validation", "test")} == {
        "train": "(1 (", "validation": "(0 z", "test": "(1 ("
    }  # fmt: skip
    tree = data.manifest.signature["input"]
    assert (tree.known, tree.names) == (2, ("x", "y", "w", "z"))


@pytest.mark.parametrize(
    ("text", "fields", "said"),
    [
        ('{"tree": ["a", "b"], "y": 7}', {"target": "y", "classes": 2}, "line 1: the label '7' is none of 0, 1"),
        ('{"tree": [], "y": 1}', {"target": "y"}, "line 1, column 10: a node without a word or children"),
        ('{"tree": "(a b", "y": 1}', {"target": "y"}, "line 1, column 11: a bracket is opened and not closed"),
        ('{"tree": "", "y": 1}', {"target": "y"}, "line 1, column 11: an empty tree"),
        ('{"tree": ["a", "b"]}', {"target": "y"}, "line 1: there is no y; known: tree"),
        ('{"tre": ["a", "b"]}', {}, "line 1: there is no tree, and no words with heads; did you mean tre?"),
        ('{"tree": ["a", ["b"}', {}, "line 1, column 10: no JSON object (a list is opened and not closed)"),
        ('{"tree": "(1 a)"', {}, "no JSON object"),
        ('{"tree": 3}', {}, "line 1: tree is no tree in brackets or nested lists"),
        ('{"words": ["a"], "heads": ["x"], "y": 1}', {"target": "y"}, "words and heads are not two lists"),
        ('{"words": ["a"], "heads": [0]}', {}, "words have no labels; set data.target to the column of labels"),
        ('{"words": [], "heads": [], "y": 1}', {"target": "y"}, "line 1: an empty tree"),
        ('{"words": ["a"], "heads": [0], "y": [1, 2]}', {"target": "y"}, "1 heads and 2 labels of 1 words"),
        ('{"tree": ["a", "b"], "y": 1.5}', {"target": "y"}, "the label 1.5 is neither a text nor a whole number"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, text, fields, said):
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    message = refusal(TreesSpec(path=str(tmp_path / "rows.jsonl"), **fields))
    assert message.startswith(f"{tmp_path}/rows.jsonl, ")
    assert said in message
    assert "\n" not in message


def test_nested_lists_deeper_than_pythons_recursion_limit(tmp_path):
    depth = 2 * sys.getrecursionlimit()
    line = '{"y": 1, "tree": ' + '["a", ' * depth + '"b"' + "]" * depth + "}\n"
    (tmp_path / "rows.jsonl").write_text(line)
    data = prepared(TreesSpec(path=str(tmp_path / "rows.jsonl"), target="y", **ONE))
    rows = made.split_rows(data, "train").columns["input"]
    assert rows.lengths.tolist() == [2 * depth + 1]
    assert rows.fields["level"][-1] == depth


def test_paths_without_trees(tmp_path):
    assert "no such file or folder" in refusal(TreesSpec(path=str(tmp_path / "x")))
    assert "no files that end in .parquet, .jsonl" in refusal(TreesSpec(path=str(tmp_path)))
    (tmp_path / "a.csv").write_text("x")
    assert "not one of .parquet" in refusal(TreesSpec(path=str(tmp_path / "a.csv")))
    (tmp_path / "a.parquet").write_text("x")
    assert "a.parquet: cannot be read" in refusal(TreesSpec(path=str(tmp_path / "a.parquet")))
    (tmp_path / "b.txt").write_text("\n")
    assert "no trees in" in refusal(TreesSpec(path=str(tmp_path / "b.txt")))


def test_unknown_words_are_counted_in_each_split_and_told(tmp_path, caplog, capsys):
    for name, line in (("train", "(3 (2 a) (2 b))"), ("dev", "(2 (2 a) (2 c))"), ("test", "(2 (2 (2 a) (2 d)) (2 b))")):
        (tmp_path / f"{name}.txt").write_text(f"{line}\n" * 4)
    caplog.set_level("INFO")
    data = prepared(SSTSpec(path=str(tmp_path)))
    unknown = {"train": (0, 8), "validation": (4, 8), "test": (4, 12)}
    assert data.manifest.signature["input"].unknown == unknown
    told = "4 of 12 tokens (33 %) of input in test are not in the vocabulary of 2"
    assert f"data: {told}" in caplog.text
    print_manifest("here", data.manifest, as_json=False)
    assert told in " ".join(capsys.readouterr().out.split())
    listops = prepared(ListOpsSpec(rows=50, depth=2, length=20))
    assert not listops.manifest.signature["input"].unknown  # none can be
