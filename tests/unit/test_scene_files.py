"""The user's own scenes: read from JSON lines and Parquet, refused by file and line, used with a trained parser."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.prepare import prepared
from cluster.data.sources.scene_files import SceneFilesSpec
from cluster.data.sources.scenes import CLASSES, ScenesSpec
from cluster.inference.evaluate import evaluate_run
from cluster.recipe.loading import load_recipe
from cluster.runs.train import train
from nn_models.errors import UserError
from tests.unit import made

WHOLE = {"validation_fraction": 0.0, "test_fraction": 0.0}
SCENE = {
    "features": [[0.5, 2], [0.25, 1], [7, 0]],
    "edges": [[1, 0], [2, 1], [0, 1]],
    "objects": ["sky", "sky", "tree"],
}


def lines_of(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scenes_of(spec, split: str = "train"):
    """[(features, edges, names of objects)], as they are stored."""
    data = prepared(spec)
    names = data.manifest.signature["input"].names
    rows = made.split_rows(data, split).columns["input"]
    found = []
    for first, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        features, neighbours, objects = (rows.fields[name][first:end] for name in ("features", "neighbours", "objects"))
        edges = sorted([place, int(b)] for place, row in enumerate(neighbours) for b in row if b >= 0)
        found.append((features.tolist(), edges, [names[label] for label in objects]))
    return found


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_scenes_are_stored_as_the_files_have_them(tmp_path, ending):
    one = {"features": [[1.5, -2]], "edges": [], "objects": ["road"]}
    path = lines_of(tmp_path / "scenes.jsonl", [SCENE, {**one, "note": [[[1]]]}])
    if ending == "parquet":
        path.unlink()
        pq.write_table(pa.Table.from_pylist([SCENE, one]), path := tmp_path / "scenes.parquet")
    spec = SceneFilesSpec(path=str(path), **WHOLE)
    assert scenes_of(spec) == [
        ([[0.5, 2], [0.25, 1], [7, 0]], [[0, 1], [1, 2]], ["sky", "sky", "tree"]),
        ([[1.5, -2]], [], ["road"]),
    ]
    column = prepared(spec).manifest.signature["input"]
    assert (column.width, column.degree, column.names) == (2, 1, ("road", "sky", "tree"))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_edges_are_kept_each_once(tmp_path_factory, data):
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        num = data.draw(st.integers(1, 6))
        place = st.integers(0, num - 1)
        edges = data.draw(st.lists(st.tuples(place, place).filter(lambda edge: edge[0] != edge[1]), max_size=12))
        labels = data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num))
        rows.append({"features": [[at] for at in range(num)], "edges": edges, "objects": labels})
    path = lines_of(tmp_path_factory.mktemp("scenes") / "scenes.jsonl", rows)
    for row, (_, edges, objects) in zip(rows, scenes_of(SceneFilesSpec(path=str(path), **WHOLE)), strict=True):
        assert edges == sorted({tuple(sorted(edge)): sorted(edge) for edge in row["edges"]}.values())
        assert objects == list(map(str, row["objects"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": [[1], [2, 3], [4]]}, "segment 1 has 2 numbers in features, where segment 0 has 1"),
        ({"features": [[1, 2], [3, "x"], [4, 5]]}, "segment 1 in features is no list of numbers that float32"),
        (
            {"features": [[1, 2], [3, 1e39], [4, 5]]},
            "segment 1 in features is no list of numbers that float32 can hold",
        ),
        (
            {"features": [[1, 2], [3, None], [4, 5]]},
            "segment 1 in features is no list of numbers that float32 can hold",
        ),
        (
            {"features": [[1, 2], [3, True], [4, 5]]},
            "segment 1 in features is no list of numbers that float32 can hold",
        ),
        ({"features": [[1, 2], [3, float("nan")], [4, 5]]}, "segment 1 in features is no list of numbers"),
        ({"features": [[1, 2], [], [4, 5]]}, "segment 1 in features is no list of numbers"),
        ({"features": [1, 2, 3]}, "segment 0 in features is no list of numbers"),
        ({"features": [[1, 2, 3]] * 3}, "segments of 3 numbers, where those of the first scene have 2"),
        ({"features": []}, "a scene without segments"),
        ({"features": "x"}, "features is no list of segments"),
        ({"edges": [[0, 3]]}, "[0, 3] in edges, where there are 3 segments, counted from 0"),
        ({"edges": [[-1, 2]]}, "[-1, 2] in edges, where there are 3 segments, counted from 0"),
        ({"edges": [[1, 1]]}, "[1, 1] in edges: a segment is not adjacent to itself"),
        ({"edges": [[0, 1, 2]]}, "[0, 1, 2] in edges is no pair of segments"),
        ({"edges": [[0, 1.5]]}, "[0, 1.5] in edges is no pair of segments"),
        ({"edges": [0, 1]}, "0 in edges is no pair of segments"),
        ({"edges": {"0": 1}}, "edges is no list of pairs of segments"),
        ({"objects": ["sky"]}, "1 labels in objects, where features has 3 segments"),
        ({"objects": "sky"}, "no list of labels in objects, where features has 3 segments"),
        ({"objects": ["sky", None, "tree"]}, "the label null is neither a text nor a whole number"),
        ({"edges": None}, "edges is no list of pairs of segments"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_line(tmp_path, changes, said):
    path = lines_of(tmp_path / "scenes.jsonl", [SCENE, SCENE | changes, SCENE])
    with pytest.raises(UserError) as caught:
        prepared(SceneFilesSpec(path=str(path)))
    assert str(caught.value).startswith(f"{path}, line 2: {said}")
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there_and_a_line_that_is_no_object(tmp_path):
    path = lines_of(tmp_path / "scenes.jsonl", [{"feature": [[1]], "edges": [], "objects": [1]}])
    with pytest.raises(UserError, match=re.escape(f"{path}, line 1: there is no features; did you mean feature?")):
        prepared(SceneFilesSpec(path=str(path)))
    path.write_text('{"features": [[1}')
    with pytest.raises(UserError, match=re.escape(f"{path}, line 1, column 14: no JSON object")):
        prepared(SceneFilesSpec(path=str(path)))
    path.write_text("\n")
    with pytest.raises(UserError, match=r"no scenes in .*scenes\.jsonl; give files that have some"):
        prepared(SceneFilesSpec(path=str(path)))
    (tmp_path / "scenes.csv").write_text("x")
    with pytest.raises(UserError, match=r"data\.path: .*scenes\.csv: not one of \.parquet, \.jsonl, \.json"):
        prepared(SceneFilesSpec(path=str(tmp_path / "scenes.csv")))


def written(scenes, names):
    """Drawn scenes as rows of a file."""
    for scene in scenes:
        edges = [[place, int(b)] for place, row in enumerate(scene.neighbours) for b in row if b >= 0]
        yield {
            "features": scene.features.tolist(),
            "edges": edges,
            "objects": [names[label] for label in scene.objects],
        }


def test_a_run_on_files_and_others_for_it(tmp_path):
    """Scenes that are drawn are the same from files, for training and for a net that has been trained."""
    drawn = ScenesSpec(rows=60, segments=6).open().scenes["train"]
    path = lines_of(tmp_path / "scenes.jsonl", written(drawn, CLASSES))
    recipe = {
        "model": {"kind": "scene_parser", "hidden": 4, "beam": 2},
        "objective": {"kind": "scene_parsing"},
        "train": {"epochs": 2, "global_batch_size": 10},
    }
    runs = [
        train(load_recipe(recipe | {"data": data}), num_workers=0, run=str(tmp_path / name))
        for name, data in (("drawn", {"kind": "scenes", "rows": 60, "segments": 6}),
                           ("files", {"kind": "scene_files", "path": str(path)}))
    ]  # fmt: skip
    one, other = (run.metrics for run in runs)
    assert one.keys() == other.keys()
    for name, value in one.items():
        # float32: the names of classes have other numbers, so all else is the same
        assert other[name] == pytest.approx(value, abs=1e-6), name
    few = lines_of(tmp_path / "few.jsonl", list(written(drawn, CLASSES))[:5])
    found = evaluate_run(runs[0].run, data=SceneFilesSpec(path=str(few), **WHOLE), split="train")
    again = evaluate_run(runs[1].run, data=SceneFilesSpec(path=str(few), **WHOLE), split="train")
    assert found["rows"] == 5
    assert found["metrics"] == pytest.approx(again["metrics"], abs=1e-6)  # as above
    lines_of(few, list(written(drawn, ("lake", "sky", "house", "8")))[:5])  # labels need only differ
    renamed = evaluate_run(runs[0].run, data=SceneFilesSpec(path=str(few), **WHOLE), split="train")
    assert renamed["metrics"] == found["metrics"]
    lines_of(few, [SCENE])
    with pytest.raises(UserError, match=r"the rows of scene_files are scene of segments of 2 numbers"):
        evaluate_run(runs[0].run, data=SceneFilesSpec(path=str(few), **WHOLE), split="train")


def test_the_first_scene_says_how_many_numbers_there_are_in_all_splits(tmp_path):
    lines_of(tmp_path / "a.jsonl", [SCENE])
    lines_of(tmp_path / "b.jsonl", [SCENE | {"features": np.zeros((3, 1)).tolist()}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: segments of 1 numbers, where those of the first scene"):
        prepared(SceneFilesSpec(path=str(tmp_path / "a.jsonl"), test_path=str(tmp_path / "b.jsonl")))
