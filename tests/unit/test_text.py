"""Texts as streams of windows: every token with the one that follows it; what cannot be used is refused by name."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.prepare import prepared
from cluster.data.sources.text import PythonDocsSpec, TextSpec
from cluster.data.vocabulary import UNKNOWN, Vocabulary
from nn_models.errors import UserError
from nn_models.spec import validate


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))


def written(tmp_path, content, name="text.txt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tokens(data, split):
    """The tokens of a split's windows, one after the other, with the last one that follows."""
    table = data.table(split)
    inputs, targets = (np.stack(table[name].to_pylist()) for name in ("input", "target"))
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert np.array_equal(inputs[1:, 0], targets[:-1, -1])
    return [*inputs.flatten().tolist(), targets[-1, -1]]


@settings(max_examples=20, deadline=None)
@given(text=st.text(min_size=30, max_size=200), window=st.integers(1, 9))
def test_windows_of_characters_are_the_text(text, window, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:  # half of a pair of UTF-16
        return
    spec = TextSpec(path=str(path), window=window, validation_fraction=0.2, test_fraction=0.1)
    data = prepared(spec)
    names = data.manifest.signature["input"].names
    assert list(names) == sorted(set(text))
    read = []
    for split in ("train", "validation", "test"):
        if data.manifest.rows(split):
            read += tokens(data, split)[:-1]
    whole = "".join(names[token] for token in read)
    assert whole == text[: len(whole)]
    assert len(text) - 1 - len(whole) < window


def test_words_that_are_rare_are_unknown():
    text = "b b b a a a c c d .\n"
    few = Vocabulary.of_text(text, "words", max_words=4)
    assert few.names == (UNKNOWN, "a", "b", "c")
    numbers = few.numbers(text, path="data")
    assert [few.names[number] for number in numbers] == [*"bbbaaacc", UNKNOWN, UNKNOWN, UNKNOWN]
    every = Vocabulary.of_text(text, "words", max_words=100)
    assert set(every.names) == {*"abcd.\n"}
    with pytest.raises(UserError, match=r"--prompt: 'x', 'y' not in the text that the model has learned from; leave"):
        every.numbers("a x b y x", path="--prompt")


@pytest.mark.parametrize(
    ("unit", "text", "spelled"),
    [
        ("characters", "Grüße, Welt", None),
        ("bytes", "Grüße, Welt", None),
        ("words", "it's (so) late , now.\nGo on!", "it's (so) late, now.\nGo on!"),
    ],
)
def test_a_text_is_spelled_again(unit, text, spelled):
    vocabulary = Vocabulary.of_text(text, unit, max_words=100)
    assert "".join(vocabulary.spelled(vocabulary.numbers(text, path=""))) == (spelled or text)


def test_bytes_need_no_text(tmp_path):
    content = bytes(range(256)) * 3
    data = prepared(TextSpec(path=str(written(tmp_path, content)), unit="bytes", window=16))
    assert data.manifest.signature["input"].size == 256
    assert bytes(tokens(data, "train")[:-1]) == content[: data.manifest.rows("train") * 16]


def test_a_folders_files_come_by_their_names(tmp_path):
    for name, text in {"b.txt": "bbbb", "a/c.txt": "aaaa", ".hidden": "xxxx", "z.md": "zzzzz"}.items():
        written(tmp_path / "texts", text, name)
    spec = TextSpec(path=str(tmp_path / "texts"), window=4, validation_fraction=0, test_fraction=0)
    names = prepared(spec).manifest.signature["input"].names
    assert "".join(names[token] for token in tokens(prepared(spec), "train")[:-1]) == "aaaabbbbzzzz"
    uri = spec.model_copy(update={"path": (tmp_path / "texts").as_uri()})
    assert uri.text() == spec.text()
    before = spec.fingerprint()
    written(tmp_path / "texts", "other", "b.txt")
    assert spec.fingerprint() != before


def test_files_come_in_the_order_of_their_folders(tmp_path):
    for name in ("a.txt", "a/z.txt", "a-b/c.txt"):
        written(tmp_path / "texts", f"{name} ", name)
    assert TextSpec(path=str(tmp_path / "texts")).text() == "a/z.txt a-b/c.txt a.txt "


def test_a_folder_without_files_is_named(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / ".hidden").write_text("text")
    with pytest.raises(UserError, match=r"data.path: .*: no files in this folder; give one that has some"):
        TextSpec(path=str(tmp_path)).text()


def test_pythons_own_help_is_english():
    data = prepared(PythonDocsSpec(window=64))
    names = data.manifest.signature["input"].names
    counts = Counter(tokens(data, "train"))
    assert [names[token] for token, _ in counts.most_common(2)] == [" ", "e"]
    assert data.manifest.order == "streams"
    assert data.manifest.rows("validation") == data.manifest.rows("test") > 0


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("", {}, "data.path: {path}: no text in there; give a file that has some"),
        ("short", {}, "data.window: 128 characters and the one that follows, but the text has 5; set a smaller window"),
        (b"good\xff", {}, "{path}: no UTF-8 text (byte 4); convert or remove it, or set data.unit to bytes"),
        (
            "one two",
            {"unit": "words", "window": 2},
            "data.window: 2 words and the one that follows, but the text has 2",
        ),
        (None, {}, "data.path: {path}: no such file or folder; check the path"),
        (None, {"path": "/dev/zero"}, "data.path: /dev/zero: neither a file nor a folder; give a file"),
        (None, {"path": ""}, "data.path: "),
        ("text", {"window": 0}, "data.window: must be greater than 0, not 0"),
        ("text", {"unit": "letters"}, "data.unit: must be 'characters', 'bytes' or 'words', not 'letters'"),
        ("a" * 30, {"window": 10}, ""),
    ],
)
def test_what_cannot_be_used_is_named(content, fields, message, tmp_path):
    path = tmp_path / "text.txt" if content is None else written(tmp_path, content)
    if not message:
        prepared(TextSpec(path=str(path), **fields))
        return
    with pytest.raises(UserError) as caught:
        prepared(validate(TextSpec, {"path": str(path), **fields}, prefix="data"))
    assert message.format(path=path) in str(caught.value)
