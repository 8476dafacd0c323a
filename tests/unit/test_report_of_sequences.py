"""The report of recurrent runs: gradients, gates, texts right and wrong, labels by step, what is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jobs.report.lines import SMALLEST, Line, line_chart
from jobs.report.texts import Words
from nn_models import zoo
from nn_models.batch import Batch, Place, Ragged
from nn_models.columns import Image, Label, Labels, Sequence, Tokens
from nn_models.evidence import ClassEvidence
from nn_models.objectives import only_here
from nn_models.sequence_evidence import StepEvidence
from nn_models.sequence_objectives import NextTokenSpec
from nn_models.signature import Signature
from nn_models.spec import validate
from tests.unit.test_report import Page, metrics, report, write_run

CPU = torch.device("cpu")
NAMES = ("the", "cat", "sat", ".", "\n", "<b>dog</b>")
WORDS = Tokens(names=NAMES, unit="words")
LENGTHS = torch.tensor([3, 7, 2, 5])
LOST = "Not on this page"


def text(column: Tokens = WORDS) -> Ragged:
    numbers = torch.randint(column.size, (int(LENGTHS.sum()),), generator=torch.Generator().manual_seed(0))
    return Ragged(numbers.int(), LENGTHS, 7)


def page_of(
    run: Path,
    tensors: dict[str, torch.Tensor],
    signature: Signature,
    *,
    section: str | None = None,
    inside: Any = ("gradients", "gates"),
    **about: Any,
) -> Page:
    """The page of a run whose test has left these tensors."""
    write_run(run, **about)
    metadata = {"split": "test", "signature": signature.model_dump_json(), "inside": json.dumps(inside)}
    metadata["class_names"] = json.dumps(getattr(signature["target"], "names", ()))
    metadata |= {"section": section} if section else {}
    save_file(tensors, run / "evaluation.safetensors", metadata)
    page = report(run)
    assert (run / "report.html").stat().st_size < 400_000
    return page


def seen(model: dict[str, Any], signature: Signature, value: Any) -> dict[str, torch.Tensor]:
    """What is seen of an untrained net."""
    spec = validate(zoo.AnyModelSpec, {"hidden": 6, "embedding": 4, **model})
    batch = Batch({"input": value}, Place.of(len(LENGTHS)), lambda: torch.arange(len(LENGTHS)))
    return dict(spec.inspect(spec.build(signature).eval(), signature, batch))


@pytest.mark.parametrize("kind", ["rnn", "lstm", "peephole_lstm", "gru"])
@pytest.mark.parametrize("rows", ["image", "vectors", "words"])
def test_gradients_and_gates_of_every_net_over_all_that_it_reads(kind: str, rows: str, tmp_path: Path):
    column, value = {
        "image": (Image(shape=(1, 8, 8)), torch.rand(4, 1, 8, 8)),
        "vectors": (Sequence(length=5, width=2), torch.rand(4, 5, 2)),
        "words": (WORDS, text()),
    }[rows]
    signature = Signature(columns={"input": column, "target": Label(names=("a", "b"))})
    evidence = ClassEvidence(2)
    columns = {"input": value, "target": torch.tensor([0, 1, 0, 1])}
    evidence.add(Batch(columns, Place.of(4), lambda: torch.arange(4), columns), torch.eye(2)[[0, 1, 1, 0]])
    tensors = evidence.tensors(only_here, CPU) | seen({"kind": kind}, signature, value)
    page = page_of(tmp_path / "run", tensors, signature, section="classes")
    assert {"Confusion", "Predictions", "Gradients through time"} <= set(page.headings)
    assert ("Gates over time" in page.headings) == (kind != "rnn")
    assert LOST not in page.headings
    assert "Learned filters" not in page.headings
    longest = {"image": 8, "vectors": 5, "words": 7}[rows]
    charts = [alternative for alternative in page.alternatives if "steps back" in alternative]
    assert charts[0].startswith("dh[T] / dh[t] by steps back, T - t: trained from 1 to ")
    assert all(f"untrained {other} from 1 to" in charts[0] for other in ("rnn", "lstm", "gru"))
    assert (len(charts) == 2) == ("lstm" in kind)
    if "lstm" in kind:
        assert charts[1].startswith("cell: dc[T] / dc[t] by steps back, T - t: trained from 1 to ")
    assert f"trained, steps back, T - t {longest}:" in page.words
    gates = {"lstm": ("input", "forget", "output"), "peephole_lstm": ("input", "forget", "output")}
    told = [alternative.split()[1] for alternative in page.alternatives if "gate, open by" in alternative]
    assert tuple(told) == ({"gru": ("reset", "update")} | gates).get(kind, ())
    assert ("What is read at each step" in page.alternatives) == (rows != "words" and kind != "rnn")


def test_layers_and_directions_have_charts_of_their_own(tmp_path: Path):
    signature = Signature(columns={"input": WORDS, "target": Label(size=2)})
    tensors = seen({"kind": "gru", "layers": 2, "bidirectional": True}, signature, text())
    page = page_of(tmp_path / "run", tensors, signature)
    for heading in (
        "layer 1: dh[T] / dh[t]",
        "layer 2, from the end: dh[T] / dh[t]",
        "Layer 1, from the end",
        "Layer 2",
    ):
        assert heading in page.headings
    many = seen({"kind": "lstm", "layers": 6}, signature, text())
    page = page_of(tmp_path / "deep", many, signature)
    assert "The gradients: only 8 of 12 charts are drawn." in page.words
    assert "2 more are not shown." in page.words


def test_what_comes_from_the_end_is_turned_back(tmp_path: Path):
    signature = Signature(columns={"input": WORDS, "target": Label(size=2)})
    tensors = seen({"kind": "gru", "bidirectional": True}, signature, text())
    steps = len(tensors["gates/steps"])
    tensors["gates/0.1.reset"] = torch.arange(steps, dtype=torch.uint8)[:, None].repeat(1, 6) * 40
    page = page_of(tmp_path / "run", tensors, signature)
    told = [a for a in page.alternatives if a.startswith("mean over units")]
    assert told[1].startswith(f"mean over units by step: reset from {40 * (steps - 1) / 255:.4g} to 0;")


@pytest.mark.parametrize("damage", ["gradients/trained/0.0.h", "gates/steps", "gates/0.0.reset"])
def test_broken_parts_cost_only_themselves(damage: str, tmp_path: Path):
    signature = Signature(columns={"input": WORDS, "target": Label(size=2)})
    tensors = seen({"kind": "gru"}, signature, text())
    tensors[damage] = torch.zeros((2, 3, 1), dtype=torch.float32)
    page = page_of(tmp_path / "run", tensors, signature)
    lost, kept = "Gradients through time", "Gates over time"
    if damage.startswith("gates"):
        lost, kept = kept, lost
    assert kept in page.headings
    assert lost not in page.headings
    assert "evaluation.safetensors cannot be read" in page.words.partition(LOST)[2]


@pytest.mark.parametrize("inside", ["gates", ["nothing here"], [["gates"]], {"a": 1}, None])
def test_names_of_sections_that_make_no_sense(inside: Any, tmp_path: Path):
    signature = Signature(columns={"input": WORDS, "target": Label(size=2)})
    page = page_of(tmp_path / "run", seen({"kind": "gru"}, signature, text()), signature, inside=inside)
    assert "Curves" in page.headings
    assert (LOST in page.headings) == (isinstance(inside, list))


def test_a_line_below_what_can_be_drawn_leaves_the_chart():
    values = 10.0 ** -np.arange(0, 40, 2)
    chart = line_chart("title", [Line("falling", "train", values)], x_label="steps", log=True)
    drawn = [label for *_, label in chart.curves[0].dots]
    assert len(drawn) == sum(values >= SMALLEST) < len(values)
    assert chart.remark == "logarithmic, from 1e-12 on"
    assert chart.curves[0].last == "1e-38"


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_a_text_classifiers_rows_are_shown_as_text_the_surest_wrong_one_first(dense: bool, tmp_path: Path):
    column = Tokens(names=NAMES, unit="words", length=4 if dense else None)
    rows = [[0, 1, 2, 3], [0, 5, 2, 3], [1, 1, 1, 1], [2, 4, 0, 1]]
    value: Any = torch.tensor(rows, dtype=torch.int32)
    value = value if dense else Ragged(value.flatten(), torch.tensor([4] * 4), 4)
    signature = Signature(columns={"input": column, "target": Label(names=("good", "bad"))})
    evidence = ClassEvidence(2)
    columns = {"input": value, "target": torch.tensor([0, 1, 0, 1])}
    batch = Batch(columns, Place.of(4), lambda: torch.arange(4), columns)
    evidence.add(batch, torch.tensor([[2.0, 0], [3, 0], [0, 1], [0, 1]]))
    page = page_of(tmp_path / "run", evidence.tensors(only_here, CPU), signature, section="classes", inside=[])
    first, second = page.words.index("the <b>dog</b> sat. bad → good"), page.words.index("cat cat cat cat good → bad")
    assert first < second < page.words.index("the cat sat. good 88 %")
    assert LOST not in page.headings


def test_characters_and_bytes_are_put_together():
    assert Words(("a", "b", " "), "characters").text([0, 2, 1]) == "a b"
    assert Words([chr(code) for code in range(256)], "bytes").text(list("né".encode())) == "né"
    assert Words(("the", "end", "."), "words").text([0, 1, 2]) == "the end."
    assert Words(("the",), None).text([0, 7]) == "the 7"  # what a token is was not said
    assert Words(("the",), "words").text([0, 7]) == "the 7"  # of another vocabulary
    assert Words((" ", "\n"), "characters").cell(1) == "\u23ce"


@pytest.mark.parametrize("words", [True, False])
def test_labels_stand_under_their_steps(words: bool, tmp_path: Path):
    value = text() if words else Ragged(torch.rand(int(LENGTHS.sum()), 2), LENGTHS, 7)
    column = WORDS if words else Sequence(width=2)
    labels = Ragged(torch.tensor([0, 1, 0] + [1] * 7 + [0, 0] + [1, 0, 1, 0, 1], dtype=torch.int32), LENGTHS, 7)
    outputs = torch.eye(2)[labels.values.long()]
    outputs[4] = outputs[4].flip(0)  # the second step of the second row
    signature = Signature(columns={"input": column, "target": Labels(names=("NOUN", "VERB"), size=2)})
    evidence = StepEvidence(2)
    columns = {"input": value, "target": labels}
    evidence.add(Batch(columns, Place.of(4), lambda: torch.arange(4), columns), outputs)
    page = page_of(tmp_path / "run", evidence.tensors(only_here, CPU), signature, section="steps", inside=[])
    assert {"Confusion", "Labels by step", "Most wrong steps first", "Right"} <= set(page.headings)
    assert "1 of 7 wrong" in page.words
    assert "all 3 right" in page.words
    assert "over all steps of the test split" in page.words
    word = "2"
    if words:
        word = NAMES[int(value.values[4])].replace("\n", "\u23ce")
    assert f"{word} NOUN VERB" in page.words  # the predicted one is struck through
    assert LOST not in page.headings


def test_a_long_row_is_shown_from_where_it_is_wrong(tmp_path: Path):
    labels = torch.zeros(2, 150, dtype=torch.int32)
    outputs = torch.eye(2)[labels.flatten().long()]
    outputs[[145, 149]] = outputs[[145, 149]].flip(1)
    signature = Signature(columns={"input": Sequence(length=150, width=1), "target": Labels(size=2, length=150)})
    evidence, columns = StepEvidence(2), {"input": torch.zeros(2, 150, 1), "target": labels}
    evidence.add(Batch(columns, Place.of(2), lambda: torch.arange(2), columns), outputs)
    page = page_of(tmp_path / "run", evidence.tensors(only_here, CPU), signature, section="steps", inside=[])
    assert "\u2026 51 0 52 0" in page.words  # the last hundred
    assert "146 1 0" in page.words
    assert "100 0 \u2026 all 150 right" in page.words


# -- language models -------------------------------------------------------------------------------------------------


def test_a_language_models_page(tmp_path: Path):
    names = ("\n", " ", "a", "<", "b")
    signature = Signature(
        columns={
            "input": Tokens(names=names, unit="characters", length=6),
            "target": Labels(names=names, size=5, length=6),
        }
    )
    net = zoo.build({"kind": "lstm", "hidden": 5, "embedding": 3}, signature).eval()
    words = torch.randint(5, (4, 7), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    batch = Batch({"input": words[:, :-1], "target": words[:, 1:]}, Place.of(4), lambda: torch.arange(4))
    tensors = dict(NextTokenSpec().build(signature).inspect(net, signature, batch))
    lines = [{**line, "bits_per_token": 2.0} for line in metrics()]
    lines[0]["bits_per_token"] = 1e9  # its perplexity is no number
    result = {"status": "finished", "metrics": {"test/loss": 1.386, "test/bits_per_token": 2.0, "test/accuracy": 0.5}}
    page = page_of(tmp_path / "run", tensors, signature, inside=["text"], lines=lines, result=result)
    assert {"Language model", "perplexity", "bits per token", "What it writes", "Where it is surprised"} <= set(
        page.headings
    )
    assert "test bits per token 2 test accuracy 50.00 % test loss 1.386" in page.words  # heads the page
    assert "the next character of a vocabulary of 5." in page.words
    assert "test 2 1.386 4" in page.words
    assert page.words.count("temperature 0.5") == page.words.count("temperature 0.8") == 1
    assert "perplexity by epoch: train from 4 to 4; validation from 4 to 4; test 4" in page.alternatives
    assert LOST not in page.headings  # neither predictions nor filters are missed


def test_a_language_model_whose_test_has_left_nothing(tmp_path: Path):
    signature = Signature(columns={"input": WORDS, "target": Labels(size=6)})
    page = page_of(tmp_path / "run", {"text/other": torch.zeros(1)}, signature, inside=["text"])
    assert "The written text: the run kept none." in page.words
    assert "Language model" in page.headings
    assert "What it writes" not in page.headings
