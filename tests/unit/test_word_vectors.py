"""Word vectors of a user's file: for words of the vocabulary, once, at the start; a run holds what it began with."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import cluster
from cluster.data.word_vectors import read_vectors
from cluster.recipe.loading import load_recipe
from cluster.training.beginning import new_model
from nn_models.columns import Label, Tokens, Tree
from nn_models.errors import UserError
from nn_models.signature import Signature
from nn_models.word_vectors import WantedVectors

WORDS = ["<unknown>", "cat", "sat", "ä", "Cat"]


def wanted(path, size=2, words=WORDS):
    return WantedVectors("vectors", str(path), words, size, "embedding")


def saved(path, words, vectors):
    save_file({"vectors": vectors}, path, metadata={"words": json.dumps(words)})
    return path


TEXT = "cat 1 2\n. . . 9 9\nä -0.5 1e-3\ndog 3 4\ncat 7 7\n"


@pytest.mark.parametrize("before", ["", "5 2\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.vec.gz"])
def test_text_has_a_line_for_each_word(before, name, tmp_path):
    content = (before + TEXT).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = read_vectors(wanted(tmp_path / name))
    assert found.places.tolist() == [1, 3]
    assert np.array_equal(found.vectors, np.array([[1, 2], [-0.5, 1e-3]], np.float32))


@settings(max_examples=25, deadline=None)
@given(
    words=st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1), min_size=1, unique=True
    ),
    size=st.integers(1, 5),
    data=st.data(),
)
def test_both_formats_say_the_same(words, size, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    chosen = data.draw(st.lists(st.sampled_from(words), min_size=1, unique=True))
    rows = np.random.default_rng(len(words)).normal(size=(len(chosen), size)).astype(np.float32)
    lines = (f"{word} {' '.join(map(repr, row.tolist()))}\n" for word, row in zip(chosen, rows, strict=True))
    (folder / "a.txt").write_text(f"{len(chosen)} {size}\n" + "".join(lines), encoding="utf-8")
    text = read_vectors(wanted(folder / "a.txt", size, words))
    tensors = read_vectors(wanted(saved(folder / "a.safetensors", chosen, rows), size, words))
    assert [words[place] for place in text.places] == sorted(chosen, key=words.index)
    assert np.array_equal(text.places, tensors.places)
    assert np.array_equal(text.vectors, tensors.vectors)
    assert np.array_equal(text.vectors, rows[[chosen.index(words[place]) for place in text.places]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat 1 2 3\n", "model.embedding: 2, but the vectors of {path} have 3 numbers; set model.embedding to 3"),
        ("9 3\ncat 1 2 3\n", "model.embedding: 2, but the vectors of {path} have 3 numbers"),
        ("cat\n", "model.embedding: 2, but the vectors of {path} have 0 numbers; give a file of word vectors"),
        ("dog 1 2\ncat 1\n", "{path}, line 2: no word and 2 numbers: cat 1; mend it"),
        ("dog 1 2\ncat 1 x\n", "{path}, line 2: no word and 2 numbers: cat 1 x; mend it"),
        ("cat 1 nan\n", "{path}: NaN or infinity in the vector of 'cat'; mend the file"),
        ("dog 1 2\n", "model.vectors: {path} has a vector for none of the 5 words of the vocabulary; give"),
        ("", "model.vectors: {path} has a vector for none of the 5 words of the vocabulary"),
        (None, "model.vectors: {path}: no such file; check the path"),
    ],
)
def test_text_that_is_no_vectors_is_named(content, message, tmp_path):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_vectors(wanted(path))
    assert message.format(path=path) in str(caught.value)


def test_tensors_that_are_no_vectors_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    for words, vectors, message in [
        (["cat"], np.zeros((1, 3), np.float32), f"model.embedding: 2, but the vectors of {path} have 3 numbers"),
        (["cat", "sat"], np.zeros((1, 2), np.float32), "2 words for a tensor of float32 of shape (1, 2); keep one"),
        (["cat"], np.zeros((1, 2), np.int64), "1 words for a tensor of int64 of shape (1, 2); keep one tensor"),
        (None, np.zeros((1, 2), np.float32), "1 tensors, without a list of words; keep one tensor"),
    ]:
        with pytest.raises(UserError) as caught:
            read_vectors(wanted(saved(path, words, vectors)))
        assert message in str(caught.value)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="not a safetensors file that can be read"):
        read_vectors(wanted(path))
    with pytest.raises(UserError, match="no such file; check the path"):
        read_vectors(wanted(tmp_path / "b.safetensors"))


def recipe_of(tmp_path, **model):
    rows = [{"text": f"cat row{number} sat ä", "label": number % 2} for number in range(32)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "vectors.txt").write_text(TEXT)
    return {
        "model": {"kind": "lstm", "hidden": 4, "embedding": 2, "vectors": str(tmp_path / "vectors.txt"), **model},
        "data": {"kind": "text_classification", "path": str(path)},
        "objective": {"kind": "classification"},
        "train": {"epochs": 1, "global_batch_size": 8, "clip_norm": 1.0, "ema_decay": 0.9},
    }


def test_a_new_model_begins_with_them(tmp_path):
    words = Tokens(names=tuple(WORDS), size=len(WORDS), unit="words")
    signature = Signature(columns={"input": words, "target": Label(size=2)})
    recipe = load_recipe(recipe_of(tmp_path))
    model, drawn = new_model(recipe, signature), new_model(recipe, signature, begins=False)
    assert torch.equal(model.embedding.weight[[1, 3]], torch.tensor([[1, 2], [-0.5, 1e-3]]))
    assert torch.equal(model.embedding.weight[[0, 2, 4]], drawn.embedding.weight[[0, 2, 4]])
    for name, weight in drawn.named_parameters():
        if name != "embedding.weight":
            assert torch.equal(model.get_parameter(name), weight)


@pytest.mark.parametrize(
    ("kind", "size"), [("recursive", "hidden"), ("rntn", "hidden"), ("tree_lstm", "embedding"),
                       ("child_sum_tree_lstm", "embedding")]
)  # fmt: skip
def test_so_do_nets_over_trees_at_the_words_they_know(kind, size, tmp_path):
    (tmp_path / "vectors.txt").write_text(TEXT)
    known = Tree(names=("cat", "ä", "sat", "dog"), size=4, known=3)  # dog is in the file, but not in the training trees
    signature = Signature(columns={"input": known, "target": Label(size=2)})
    model = {"kind": kind, size: 2, "vectors": str(tmp_path / "vectors.txt"), "freeze_vectors": True}
    recipe = load_recipe({"model": model, "data": {"kind": "listops"}})
    net, drawn = new_model(recipe, signature), new_model(recipe, signature, begins=False)
    torch.testing.assert_close(net.embedding(torch.arange(2)), torch.tensor([[1, 2], [-0.5, 1e-3]]))  # by a factor
    assert torch.equal(net.embedding.weight[2:], drawn.embedding.weight[2:])
    assert [name for name, weight in net.named_parameters() if not weight.requires_grad] == ["embedding.weight"]
    wrong = load_recipe({"model": {**model, size: 3}, "data": {"kind": "listops"}})
    with pytest.raises(UserError, match=rf"model.{size}: 3, but the vectors of .* have 2 numbers; set model.{size} to"):
        new_model(wrong, signature)


def test_a_run_does_without_the_file_once_it_has_begun(tmp_path, caplog):
    recipe = recipe_of(tmp_path, freeze_vectors=True)
    caplog.set_level("INFO")
    run = cluster.train(recipe, run=str(tmp_path / "run")).run
    assert "model.vectors: 2 of 30 words have a vector there, the others are drawn" in caplog.text
    (tmp_path / "vectors.txt").unlink()
    model = cluster.open_model(run)
    frozen = model.net.embedding.weight[[model.manifest.signature["input"].names.index(word) for word in ("cat", "ä")]]
    assert torch.equal(frozen, torch.tensor([[1, 2], [-0.5, 1e-3]]))
    assert len(model.predict(["cat sat"])) == 1
    Path(run, "result.json").unlink()  # as if it had been killed before the end
    assert cluster.train(recipe, run=run, resume=True).status == "finished"
    with pytest.raises(UserError, match=r"model.vectors: .*vectors.txt: no such file"):
        cluster.train(recipe, run=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"vectors": None, "freeze_vectors": True}, {}, "model.freeze_vectors: there are no vectors; name their file"),
        ({}, {"kind": "adding"}, "model.vectors: the input has no words by name; leave it out, or choose texts"),
        ({"embedding": 3}, {}, "model.embedding: 3, but the vectors of"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(model, data, message, tmp_path):
    recipe = recipe_of(tmp_path, **model)
    if data:
        recipe |= {"data": data, "objective": {"kind": "regression"}}
    with pytest.raises(UserError) as caught:
        cluster.train(recipe, run=str(tmp_path / "run"))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
