"""Data as a user finds it: pickled shards, folders of images with other things in them, names that are not UTF-8."""

import json
import os
from pathlib import Path

import pyarrow as pa
from PIL import Image

from tests.unit.pickled import extended, objects, replace, with_column


def test_shards_that_would_run_code_are_refused(manta, refused, tmp_path):
    data, mark = tmp_path / "data", tmp_path / "code-ran"
    assert manta("data", "prepare", "digits", "--out", data)[0] == 0

    def pickled(table: pa.Table) -> pa.Table:
        field = extended("row", pa.large_binary(), "ray.data.arrow_pickled_object")
        return with_column(table, field, objects(mark, len(table)))

    file = replace(data, "test", pickled)
    said = (
        f"{file}: the shard holds the extension type ray.data.arrow_pickled_object in column row, which is not read; "
        f"delete {data} and prepare the data again"
    )
    assert refused("data", "inspect", data) == said
    section = f"data={{kind: shards, path: {data}}}"
    assert refused("train", "digits-mlp", "--set", section, "--run", tmp_path / "run") == said
    assert not mark.exists()


def draw(file: Path, colour: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), colour).save(file)


def test_what_of_a_folder_is_not_used_is_said(manta, tmp_path):
    photos = tmp_path / "photos"
    for name in ("Train/cat", "Train/dog", "val/cat", "val/dog"):
        for number in range(10):
            draw(photos / name / f"{number}.png", number)
    Path(os.fsdecode(os.fsencode(photos) + b"/Train/cat/caf\xe9.txt")).write_text("")
    source = f"{{kind: image_folder, path: {photos}, channels: 1}}"
    code, out, err = manta("data", "prepare", source, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert err.strip() == f"WARNING: {photos}: not used: 1 file of endings that no image has (.txt 1)"
    shards = json.loads(out)["splits"]
    assert {split: sum(shard["rows"] for shard in shards[split]) for split in shards} == {
        "train": 18,
        "validation": 20,
        "test": 2,
    }


def test_a_run_beside_a_name_that_is_not_utf_8(refused, tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("")
    said = refused("train", "digits-mlp", "--run", tmp_path)
    assert said == f"{tmp_path}: not an empty directory; choose another one with --run"
    said = refused("train", "digits-mlp", "--run", tmp_path / "caf\udce9")
    assert said == f"{tmp_path}/caf\\xe9: a name that is not UTF-8; choose another one, or rename it"
