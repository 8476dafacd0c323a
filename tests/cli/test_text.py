"""Language models on the command line: trained, and going on with a text."""

import json

import pytest

import cluster

FEW = {
    "data": {"kind": "text", "window": 8},
    "model": {"kind": "gru", "hidden": 8, "embedding": 4},
    "train": {"epochs": 1, "global_batch_size": 8},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("the cat sat on the mat.\n" * 100)
    overrides = {**FEW, "data": {**FEW["data"], "path": str(folder / "a.txt")}}
    return cluster.train("docs-lstm", overrides=overrides, run=str(folder / "run")).run


def test_a_text_is_printed_as_it_is_made(manta, run):
    code, out, _ = manta("generate", run, "--prompt", "the c", "--num", 20, "--seed", 3)
    assert code == 0
    assert out.startswith("the c")
    assert len(out) == len("the c") + 20 + 1
    again = manta("generate", run, "--prompt", "the c", "--num", 20, "--seed", 3, "--json")[1]
    assert json.loads(again)["text"] == out[:-1]
    likeliest = [manta("generate", run, "--num", 30, "--temperature", 0, "--seed", seed)[1] for seed in (1, 2)]
    assert likeliest[0] == likeliest[1]


def test_a_text_is_written_to_a_file(manta, run, tmp_path):
    assert manta("generate", run, "--num", 5, "--out", tmp_path / "b.txt")[:2] == (0, "")
    assert len((tmp_path / "b.txt").read_text()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "The Q"], "--prompt: 'T', 'Q' not in the text that the model has learned from; leave them out"),
        (["--label", "3"], "--label: a text has no label; leave it out, or give the run of a conditional GAN"),
        (["--temperature", "-1"], "'--temperature': "),
    ],
)
def test_what_cannot_be_is_refused(manta, run, arguments, message):
    code, _, err = manta("generate", run, *arguments)
    assert code == 2
    assert message in err


def test_words_of_a_prompt_that_are_not_in_the_vocabulary_are_told(manta, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n" * 100)
    words = {**FEW, "data": {**FEW["data"], "unit": "words", "max_words": 5, "path": str(tmp_path / "a.txt")}}
    run = cluster.train("docs-lstm", overrides=words, run=str(tmp_path / "run")).run
    code, out, err = manta("generate", run, "--prompt", "the dog cat", "--num", 3)
    assert code == 0
    assert out.startswith("the dog cat")
    assert "--prompt: 'dog' not in the vocabulary, so read as <unknown>" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.path: {path}: no text in there; give a file that has some"),
        (
            b"abc",
            "data.window: 128 characters and the one that follows, but the text has 3; set a smaller window, or give",
        ),
        (b"good\xff", "{path}: no UTF-8 text (byte 4); convert or remove it, or set data.unit to bytes"),
        (None, "data.path: {path}: no such file or folder; check the path"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(refused, tmp_path, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    told = refused("data", "prepare", f"{{kind: text, path: {path}}}", "--out", tmp_path / "out")
    assert told.startswith(message.format(path=path))
    assert "\n" not in told


def test_another_text_is_read_with_the_models_tokens(manta, refused, run, tmp_path):
    (tmp_path / "b.txt").write_text("cats on mats sat.\n" * 20)
    code, out, _ = manta("evaluate", run, "--data", f"{{kind: text, path: {tmp_path}/b.txt}}", "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["test/bits_per_token"] > 0
    (tmp_path / "c.txt").write_text("What a text!\n" * 20)
    told = refused("evaluate", run, "--data", f"{{kind: text, path: {tmp_path}/c.txt}}")
    assert told == "data: 'W', 'x', '!' not in the text that the model has learned from; leave them out"
