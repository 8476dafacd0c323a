"""The report of runs over trees: classes of nodes, where predictions turn, unknown words, parses beside true trees."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.data.layouts import Ragged as Stored
from jobs.report.trees import MOST_WORDS, Mark, picture
from nn_models.batch import Batch, Forest, Place, Ragged
from nn_models.columns import Labels, Tree
from nn_models.parser import Brackets, Parsed
from nn_models.parser_objective import ParseEvidence
from nn_models.signature import Signature
from nn_models.tree_evidence import TreeEvidence
from tests.unit.test_report_of_sequences import CPU, LOST, page_of

NAMES = ("not", "<b>good</b>", "film", "odd")
SIGNATURE = Signature(
    columns={
        "input": Tree(names=NAMES, size=4, known=3),
        "target": Labels(names=("negative", "neutral", "positive"), size=3),
    }
)


def forest(*trees: list[tuple[int, ...]]) -> Forest:
    """Nodes as (word,), or as their two children."""
    words, children, level, lengths = [], [], [], []
    for tree in trees:
        begin = len(words)
        for node in tree:
            words.append(node[0] if len(node) == 1 else -1)
            children.append([-1, -1] if len(node) == 1 else list(node))
            level.append(0 if len(node) == 1 else 1 + max(level[begin + child] for child in node))
        lengths.append(len(tree))
    fields = {"words": words, "children": children, "level": level}
    stored = Stored.of({name: np.array(values, np.int32) for name, values in fields.items()}, lengths)
    return stored.collate(SIGNATURE["input"], CPU)


NOT_GOOD = [(0,), (1,), (0, 1)]
NOT_GOOD_FILM = [(0,), (1,), (2,), (1, 2), (0, 3)]
ODD = [(3,)]


def evidence(predictions: list[int], targets: list[int]) -> dict[str, torch.Tensor]:
    trees = forest(NOT_GOOD, NOT_GOOD_FILM, ODD)
    labels = Ragged(torch.tensor(targets, dtype=torch.int32), trees.lengths, 5)
    found = TreeEvidence(3, num_known=3)
    batch = Batch({"input": trees, "target": labels}, Place.of(3), lambda: None, stored={"input": trees})
    found.add(batch, 3 * torch.eye(3)[predictions])
    return found.tensors(lambda values: values, CPU)


def test_trees_right_and_wrong_and_where_the_prediction_turns(tmp_path: Path):
    targets = [1, 2, 0, 1, 2, 1, 2, 0, 1]
    predictions = [1, 2, 0, 1, 2, 1, 2, 2, 1]
    tensors = evidence(predictions, targets)
    assert tensors["flipped_rows"].tolist() == [0]  # not good: negative above neutral and positive
    assert tensors["words"].tolist() == [1, 6]
    page = page_of(tmp_path / "run", tensors, SIGNATURE, section="trees", inside=[])
    headings = {"Confusion", "Up the tree", "Trees", "Where the prediction turns", "Right as a whole"}
    assert headings | {"Wrong as a whole, most confident first"} <= set(page.headings)
    assert LOST not in page.headings
    assert "Of 6 words of the test split 1 (17 %) are not in the vocabulary of 3" in page.words.replace("\u202f", " ")
    assert "Classes: 0 negative, 1 neutral, 2 positive." in page.words
    assert "Tree of: not <b>good</b> film" in page.alternatives
    assert "2 (0)" in page.words  # predicted, and the true class
    html = (tmp_path / "run" / "report.html").read_text()
    assert "predicted positive, 91 %; true negative" in html
    assert html.count('class="node flips"') == 2  # of one tree that is shown twice
    assert "<b>good</b>" not in html


def test_no_flips_and_nothing_wrong(tmp_path: Path):
    same = [1, 1, 1, 1, 1, 1, 1, 1, 1]
    page = page_of(tmp_path / "run", evidence(same, same), SIGNATURE, section="trees", inside=[])
    assert "Where the prediction turns" not in page.headings
    assert "Right as a whole" in page.headings
    assert LOST not in page.headings


@pytest.mark.parametrize("damage", ["confusion", "heights", "words", "example_predictions.values", "flipped_rows"])
def test_broken_parts_cost_only_themselves(damage: str, tmp_path: Path):
    targets = [1, 2, 0, 1, 2, 1, 2, 0, 1]
    tensors = {**evidence(targets, targets), damage: torch.zeros(2, 3, 1)}
    page = page_of(tmp_path / "run", tensors, SIGNATURE, section="trees", inside=[])
    assert "Trees" in page.headings or damage.startswith("example")
    assert (LOST in page.headings) == (damage != "flipped_rows")


def test_parses_beside_true_trees(tmp_path: Path):
    trees = forest(NOT_GOOD_FILM, NOT_GOOD_FILM, ODD)
    found = torch.tensor([[[0, 2], [0, 3]], [[1, 3], [0, 3]], [[-1, -1], [-1, -1]]])
    right = Brackets.of(trees).has(found) & (found[..., 0] >= 0)
    none = torch.zeros(3)
    parsed = Parsed(found, right, torch.tensor([2, 2, 0]), none, none, torch.zeros(3, 2, 2), right)
    gathered = ParseEvidence()
    gathered.add(Batch({"input": trees}, Place.of(3), lambda: None, stored={"input": trees}), parsed)
    tensors = gathered.tensors(lambda values: values, CPU)
    metrics = {"test/loss": 1.0, "test/bracket_f1": 0.5, "test/left_bracket_f1": 0.25}
    result = {"status": "finished", "metrics": metrics}
    page = page_of(tmp_path / "run", tensors, SIGNATURE, section="parses", inside=[], result=result)
    assert {"Brackets", "Parses", "Largest share of wrong brackets", "Right, the longest first"} <= set(page.headings)
    words = page.words.replace("\u202f", " ")
    assert "the parser 50.0 % trees to the left 25.0 %" in words
    assert "2 50.0 % 50.0 % 2 3 100.0 % 100.0 % 2 4 to 5 - - 0" in words
    assert page.alternatives.count("Tree of: not <b>good</b> film") == 6  # three trees, each in its frame
    assert (tmp_path / "run" / "report.html").read_text().count("not in the true tree") == 1
    assert LOST not in page.headings


def test_pictures_keep_words_apart_and_the_root_above():
    words = [*map(str, range(MOST_WORDS)), *[None] * (MOST_WORDS - 1)]
    children = [[-1, -1]] * MOST_WORDS
    for number in range(MOST_WORDS - 1):
        children.append([MOST_WORDS - 2 - number, MOST_WORDS - 1 + number])
    drawn = picture(words, children, [Mark()] * len(words))
    assert [word.text for word in drawn.words] == words[:MOST_WORDS]
    places = [word.x for word in drawn.words]
    assert min(np.diff(places)) >= 34
    assert len(drawn.edges) == len(words) - 1
    assert all(above < below for _, above, _, below in drawn.edges)
    assert drawn.nodes[-1].y == min(node.y for node in drawn.nodes)
    sentence = picture(["dogs", "old", "bark"], [[-1, -1], [-1, -1], [0, 1]], [Mark()] * 3)  # words at all nodes
    assert [(word.text, word.inside) for word in sentence.words] == [("dogs", False), ("old", False), ("bark", True)]
    assert sentence.words[-1].y < sentence.nodes[-1].y < sentence.words[0].y
    for broken in ([[1, -1], [-1, -1]], [], [[-1, -1], [0, 0]]):
        with pytest.raises(ValueError, match="no tree"):
            picture(["a"] * len(broken), broken, [Mark()] * len(broken))
