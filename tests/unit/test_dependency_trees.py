"""Dependency trees: heads that make one and heads that do not, CoNLL-U files; spaces inside of words, in all files."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.data.prepare import prepared
from cluster.data.sources.flat_trees import of_heads
from cluster.data.sources.trees import TreesSpec
from tests.unit import made
from tests.unit.test_trees_data import ONE, lines_of, refusal


@given(st.data())
def test_heads_are_those_of_the_tree(data):
    num = data.draw(st.integers(1, 30))
    order = data.draw(st.permutations(range(1, num + 1)))
    heads = [0] * num
    for place, word in enumerate(order[1:], start=1):
        heads[word - 1] = order[data.draw(st.integers(0, place - 1))]
    tree = of_heads([str(word) for word in range(1, num + 1)], heads, [None] * num, where="")
    found = {child: int(tree.words[node]) for node, below in enumerate(tree.children) for child in below}
    assert {int(tree.words[child]): head for child, head in found.items()} == {
        word: head for word, head in enumerate(heads, start=1) if head
    }
    assert all(child < node for node, below in enumerate(tree.children) for child in below)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ([2, 0, 4], "word 3 ('c') has the head 4, where there are 3 words"),
        ([2, 0, -1], "word 3 ('c') has the head -1, where there are 3 words"),
        ([0, 3, 2], "heads go in a circle: 2 -> 3 -> 2"),
        ([0, 2, 2], "heads go in a circle: 2 -> 2"),
        ([2, 1, 1], "words with the head 0: none; give one word the head 0, the root"),
        ([0, 0, 1], "words with the head 0: 1, 2"),
    ],
)
def test_heads_that_make_no_tree(tmp_path, heads, said):
    rows = [
        {"words": ["a", "b", "c"], "heads": [0, 1, 2], "label": 0},
        {"words": ["a", "b", "c"], "heads": heads, "label": 1},
    ]
    message = refusal(TreesSpec(path=lines_of(tmp_path, rows), target="label"))
    assert message.startswith(f"{tmp_path}/rows.jsonl, line 2: {said}")


# -- CoNLL-U -------------------------------------------------------------------------------------------------------

SENTENCES = """# sent_id = 1
# mood = good
1-2\tDont\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\t_\t_\t3\taux\t_\t_
2\tnot\tnot\tPART\t_\t_\t3\tadvmod\t_\t_
3\tgo\tgo\tVERB\t_\t_\t0\troot\t_\t_
3.1\tthere\t_\t_\t_\t_\t_\t_\t_\t_

# mood = bad
1\tStay\tstay\tVERB\t_\t_\t0\troot\t_\t_
"""


def test_sentences_of_conllu(tmp_path):
    (tmp_path / "en.conllu").write_text(SENTENCES)
    data = prepared(TreesSpec(path=str(tmp_path), target="mood", **ONE))
    tree = data.manifest.signature["input"]
    rows = made.split_rows(data, "train").columns
    assert tree.words_at == "nodes"
    assert [tree.names[word] for word in rows["input"].fields["words"]] == ["Do", "not", "go", "Stay"]
    assert sorted(rows["input"].fields["children"][2].tolist()) == [0, 1]
    assert rows["target"].values.tolist() == [1, 0]
    tagged = prepared(TreesSpec(path=str(tmp_path), target="upos", **ONE))
    names, values = tagged.manifest.signature["target"].names, made.split_rows(tagged, "train").columns["target"]
    assert sorted(names[label] for label in values.fields["values"]) == ["AUX", "PART", "VERB", "VERB"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1\tDo\t0\n", "line 1: 3 fields, not 10 with tabs between"),
        ("2\tDo\t_\t_\t_\t_\t0\t_\t_\t_\n", "line 1: the word number '2' after 0"),
        ("1\tDo\t_\t_\t_\t_\t_\t_\t_\t_\n", "line 1: the head '_' is no number"),
        ("1\tDo\t_\t_\t_\t_\t1\t_\t_\t_\n", "line 1: words with the head 0: none"),
    ],
)
def test_conllu_that_is_none(tmp_path, line, said):
    (tmp_path / "en.conllu").write_text(line)
    assert f"en.conllu, {said}" in refusal(TreesSpec(path=str(tmp_path / "en.conllu"), target="upos"))


def conllu(*heads: int, words: Sequence[str] = "abcdefgh") -> str:
    """A sentence of so many words."""
    tokens = enumerate(zip(words[: len(heads)], heads, strict=True), start=1)
    return "".join(f"{at}\t{word}\t_\tX\t_\t_\t{head}\t_\t_\t_\n" for at, (word, head) in tokens) + "\n"


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ([2, 0, 9], "word 3 ('c') has the head 9, where there are 3 words; mend the line, or take it out"),
        ([0, 3, 4, 2], "heads go in a circle: 2 -> 3 -> 4 -> 2; let each word's heads lead to the root"),
        ([0, 2, 1], "heads go in a circle: 2 -> 2; let each word's heads lead to the root"),
        ([0, 1, 0], "words with the head 0: 1, 3; give one word the head 0, the root"),
    ],
)
def test_heads_in_conllu_that_point_nowhere_or_in_a_circle(tmp_path, heads, said):
    path = tmp_path / "en.conllu"
    path.write_text(f"{conllu(0, 1)}{conllu(*heads)}{conllu(0)}")
    assert refusal(TreesSpec(path=str(path), target="upos")) == f"{path}, line 4: {said}"


def test_spaces_inside_of_words_stay_there(tmp_path):
    """U+00A0, which the treebank has in tokens, and others that some would split at, in all kinds of files."""
    words = ["1\N{NO-BREAK SPACE}1/2", "a\N{EM SPACE}b", "c\x85d", "\N{NO-BREAK SPACE}", "e\N{LINE SEPARATOR}f"]
    row = json.dumps({"tree": words, "y": 1}, ensure_ascii=False)
    files = {
        "trees.txt": (f"(0 {' '.join(f'(1 {word})' for word in words)})\n", None),
        "rows.jsonl": (f"{row}\n", "y"),
        "en.conllu": (conllu(2, 3, 4, 5, 0, words=words), "upos"),
    }
    for name, (text, target) in files.items():
        (tmp_path / name).write_text(text, newline="\n")
        data = prepared(TreesSpec(path=str(tmp_path / name), target=target, **ONE))
        tree, found = data.manifest.signature["input"], made.split_rows(data, "train").columns["input"]
        assert [tree.names[word] for word in found.fields["words"] if word >= 0] == words
