"""Labelled texts on Ray: converted elsewhere they are the same, and any number of workers trains alike on them."""

import json

import pytest

import cluster
from cluster.data.conversion import ray_mapper
from cluster.data.prepare import prepare
from cluster.data.sources.text_files import SequenceLabellingSpec
from cluster.storage import Folder
from tests.ray.test_workers import lines


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_are_converted_alike_elsewhere(ray, tmp_path):
    (tmp_path / "rows").mkdir()
    for file in range(3):  # a part each
        rows = [{"tokens": f"word{number} of {file}", "labels": "X Y X"} for number in range(10)]
        json_lines(tmp_path / "rows" / f"{file}.jsonl", rows)
    spec = SequenceLabellingSpec(path=str(tmp_path / "rows"), min_count=2)
    here = prepare(spec, Folder(tmp_path / "here"))
    assert prepare(spec, Folder(tmp_path / "there"), mapper=ray_mapper(ray)) == here
    assert here.signature["input"].unknown["test"][0] > 0


def test_two_workers_train_alike_on_texts_and_word_vectors(ray, tmp_path):
    rows = [
        {"text": f"{'a' if number % 3 else 'the'} cat " * (1 + number % 5), "label": number % 2} for number in range(60)
    ]
    (tmp_path / "vectors.txt").write_text("cat 0.1 0.2 -0.3 0.4\nthe 1 0 0 1\n")
    recipe = {
        "model": {"kind": "gru", "hidden": 8, "embedding": 4, "vectors": str(tmp_path / "vectors.txt")},
        "data": {"kind": "text_classification", "path": json_lines(tmp_path / "rows.jsonl", rows)},
        "objective": {"kind": "classification"},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "train": {"epochs": 2, "global_batch_size": 12, "log_every_steps": 1, "cpus_per_worker": 1},
    }
    runs = [cluster.train(recipe, num_workers=workers, run=str(tmp_path / f"run{workers}")).run for workers in (0, 2)]
    digests = [[line["rows_digest"] for line in lines(run, ends=True)] for run in runs]
    assert digests[0] == digests[1]
    # float32 sums in another order, over 8 steps
    losses = [[line["loss"] for line in lines(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
