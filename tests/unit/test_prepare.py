"""Preparing: once, into the cache or a folder; half a data set is none; splits follow from the seed alone."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.data import prepare as preparing
from cluster.data.layouts import Dense, Layout, Ragged
from cluster.data.manifest import SPLITS, Manifest, StoredColumn
from cluster.data.prepare import cache_key, prepare, prepared
from cluster.data.shards import DataSet
from cluster.data.sources.base import DrawnTestSpec, Part
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import DigitsSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.sources.prepared import ShardsSpec
from cluster.data.split import Traits
from cluster.storage import Folder
from nn_models.columns import Labels, Numbers, Tokens, Tree
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{tmp_path}: not empty; choose a new folder"):
        prepare(DigitsSpec(), Folder(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/file/out: cannot be written .*choose another"):
        prepare(DigitsSpec(), Folder(tmp_path / "file" / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=rf"{tmp_path}/out: cannot be written .*choose another"):
        prepare(DigitsSpec(), Folder(tmp_path / "out"))
    with pytest.raises(UserError, match=rf"{tmp_path}: cannot be written .*choose another"):
        prepare(DigitsSpec(), Folder(tmp_path))


def test_prepared_data_is_not_prepared_again(tmp_path):
    with pytest.raises(UserError, match="shards is prepared already"):
        prepare(ShardsSpec(path=str(tmp_path / "data")), Folder(tmp_path / "out"))


def test_the_cache_is_used_and_repaired(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    spec = made.features(tmp_path / "in", 100)
    folder = prepared(spec).folder.local
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepared(spec).folder.local == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    (folder / "manifest.json").unlink()  # as a deletion that was interrupted leaves it
    assert prepared(spec).folder.local == folder
    assert sorted(file.name for file in folder.parent.iterdir()) == [folder.name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=rf"MANTA_CACHE: {tmp_path}/file cannot be written"):
        prepared(DigitsSpec())


TWO_AT_ONCE = """
import sys, time
from pathlib import Path
from cluster.data import prepare as preparing
from cluster.data.sources.parquet import ParquetSpec

own, other, path = sys.argv[1:]
publish = preparing.publish

def publish_together(unfinished, folder):
    Path(own).touch()
    for _ in range(1000):
        if Path(other).exists():
            break
        time.sleep(0.01)
    publish(unfinished, folder)

preparing.publish = publish_together
print(preparing.prepared(ParquetSpec(path=path, input="x", target="y")).folder)
"""


def test_two_processes_may_prepare_the_same_data_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    spec = made.features(tmp_path / "in", 100)
    flags = [str(tmp_path / "a"), str(tmp_path / "b")]
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_AT_ONCE, *order, spec.path], stdout=subprocess.PIPE, text=True)
        for order in (flags, flags[::-1])
    ]
    printed = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert printed == {str(prepared(spec).folder)}
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1


KILLED = """
import sys, time
from cluster.data import prepare as preparing
from cluster.data.sources.parquet import ParquetSpec

write_shard = preparing.write_shard

def write_slowly(folder, name, rows, columns):
    shard = write_shard(folder, name, rows, columns)
    if name == "train-00002.parquet":
        print("writing", flush=True)
        time.sleep(60)
    return shard

preparing.write_shard = write_slowly
preparing.prepared(ParquetSpec(path=sys.argv[1], input="x", target="y"))
"""


def test_a_kill_while_preparing_leaves_no_half_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    spec = made.features(tmp_path / "in", 500)
    process = subprocess.Popen([sys.executable, "-c", KILLED, spec.path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = (tmp_path / "cache" / "data").iterdir()
    assert left.name.startswith(".")
    with pytest.raises(UserError, match="no prepared data set here"):
        DataSet(str(left))
    data = prepared(spec)
    assert data.manifest.rows("train") == 400
    data.verify()


def test_whoever_only_writes_shards_waits_for_no_torch():
    command = "import sys, cluster.data.conversion, cluster.data.sources.catalogue; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout == "False\n"


# -- the cache's key -------------------------------------------------------------------------------------------------


def test_the_key_follows_the_fields_that_decide_what_is_prepared(tmp_path):
    spec = made.images(tmp_path / "in", 30)
    for change in ({"validation_fraction": 0.2}, {"split_seed": 1}, {"test_fraction": 0.3}, {"target_kind": "number"}):
        assert cache_key(spec.model_copy(update=change)) != cache_key(spec)
    for change in ({"shuffle_window": 5}, {"augment": ()}):
        assert cache_key(spec.model_copy(update=change)) == cache_key(spec)


def test_the_key_follows_the_content(tmp_path):
    spec = made.features(tmp_path / "in", 30)
    keys = {cache_key(spec)}
    made.features(tmp_path / "in", 30, seed=1)  # the same description must see it: a notebook keeps its recipe
    keys.add(cache_key(spec))
    made.features(tmp_path / "in", 31, seed=1)
    keys.add(cache_key(spec))
    assert len(keys) == 3
    assert prepared(spec).manifest.rows("train") == 25


def test_the_key_follows_images_that_are_replaced(tmp_path):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.bmp")
    spec = ImageFolderSpec(path=str(tmp_path), channels=1)
    keys = {cache_key(spec)}
    Image.new("L", (4, 4), 200).save(tmp_path / "a/1.bmp")  # as many bytes as before
    os.utime(tmp_path / "a/1.bmp", ns=(0, time.time_ns() + 10**9))
    keys.add(cache_key(spec))
    (tmp_path / "a/2.bmp").rename(tmp_path / "b/3.bmp")
    keys.add(cache_key(spec))
    assert len(keys) == 3


# -- splits ----------------------------------------------------------------------------------------------------------


class _Numbers:
    """A source of numbered rows."""

    def __init__(self, pools: dict[str, list[int]]) -> None:
        self.columns = {name: StoredColumn(column=Numbers(size=1)) for name in ("input", "target")}
        self.pools = {pool: [Part(rows, None) for rows in parts] for pool, parts in pools.items()}

    def traits(self, part):
        return Traits()


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=10),
    st.none() | st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_splits_are_deterministic_disjoint_and_complete(train, test, validation_fraction, test_fraction, seed):
    source = _Numbers({"train": train} | ({"test": test} if test else {}))
    spec = DrawnTestSpec(
        kind="numbers", validation_fraction=validation_fraction, test_fraction=test_fraction, split_seed=seed
    )
    held_out = round(sum(train) * validation_fraction) + (0 if test else round(sum(train) * test_fraction))
    if held_out >= sum(train):
        with pytest.raises(UserError, match="none is left to train on"):
            preparing._deal(source, spec)
        return
    slots = preparing._deal(source, spec)
    again = preparing._deal(source, spec)
    assert all((a.splits == b.splits).all() and (a.ids == b.ids).all() for a, b in zip(slots, again, strict=True))
    splits = np.concatenate([slot.splits for slot in slots])
    ids = np.concatenate([slot.ids for slot in slots])
    assert len(splits) == sum(train) + sum(test or [])
    for index in range(len(SPLITS)):
        assert ids[splits == index].tolist() == list(range((splits == index).sum()))
    assert (splits == SPLITS.index("validation")).sum() == round(sum(train) * validation_fraction)
    if test:
        assert (splits[sum(train) :] == SPLITS.index("test")).all()
        assert (splits[: sum(train)] != SPLITS.index("test")).all()
    else:
        assert (splits == SPLITS.index("test")).sum() == round(sum(train) * test_fraction)


class _Text(made.MadeSpec):
    """Windows of one text, in its order."""

    order = "streams"


def test_splits_of_a_text_are_stretches_of_it(tmp_path):
    windows = Dense(np.arange(100 * 5, dtype=np.int32).reshape(100, 5))
    columns = {"input": StoredColumn(column=Tokens(size=500, length=5), dtype="int32")}
    spec = _Text(source=made.MadeSource(columns, {"input": windows}, 30), validation_fraction=0.2)
    data = made.written(spec, tmp_path)
    assert data.manifest.order == "streams"
    assert json.loads((tmp_path / "manifest.json").read_text())["order"] == "streams"
    texts = [made.split_rows(data, split).columns["input"].values.ravel().tolist() for split in SPLITS]
    assert texts == [list(range(350)), list(range(350, 450)), list(range(450, 500))]


def test_other_seeds_split_otherwise(tmp_path):
    spec = made.features(tmp_path / "in", 100)
    other = spec.model_copy(update={"split_seed": 1})
    splits = [made.split_rows(made.written(s, tmp_path / str(i)), "test") for i, s in enumerate((spec, spec, other))]
    numbers = [made.number_of(rows.columns["input"].values).tolist() for rows in splits]
    assert numbers[0] == numbers[1] != numbers[2]


def test_no_validation_and_no_test_split(tmp_path):
    spec = made.features(tmp_path / "in", 50, validation_fraction=0, test_fraction=0)
    manifest = made.written(spec, tmp_path / "out").manifest
    assert set(manifest.splits) == {"train"}
    assert manifest.rows("validation") == 0


def test_one_row_is_a_data_set(tmp_path):
    spec = made.features(tmp_path / "in", 1, target="number")
    manifest = made.written(spec, tmp_path / "out").manifest
    assert {split: manifest.rows(split) for split in SPLITS} == {"train": 1, "validation": 0, "test": 0}


def test_a_hundred_thousand_classes(tmp_path):
    table = pa.table({"x": np.arange(100_000, dtype=np.float32), "y": np.arange(100_000)})
    pq.write_table(table, tmp_path / "many.parquet")
    manifest = prepared(ParquetSpec(path=str(tmp_path / "many.parquet"), input="x", target="y")).manifest
    assert isinstance(manifest, Manifest)
    assert manifest.signature.num_outputs == 100_000
    assert manifest.class_names[99_999] == "99999"  # in the order of numbers, not of letters


# -- rows of elements ------------------------------------------------------------------------------------------------

TOKENS, MARKS = StoredColumn(column=Tokens(size=9)), StoredColumn(column=Labels(size=3, of="text"))


def elements(*lengths: int) -> Ragged:
    return Ragged.of({"values": np.ones(sum(lengths), np.int32)}, lengths)


def refused(columns: dict[str, StoredColumn], rows: dict[str, Layout], folder) -> list[str]:
    with pytest.raises(UserError) as caught:
        made.written(made.columns(columns, rows, part_rows=4), folder)
    return str(caught.value).splitlines()


def test_rows_without_an_element_are_named(tmp_path):
    said = refused({"text": TOKENS}, {"text": elements(1, 0, 2, 3, 3, 3, 0, 1)}, tmp_path)
    assert said == [
        f"data, part {part}, row {row}: its text has no element; drop the row, or mend it"
        for part, row in ((0, 1), (1, 2))
    ]


def test_an_empty_tree_is_named_and_takes_no_other_trees_root(tmp_path):
    trees = Ragged.of(made.trees(np.array([2, 3]), np.random.default_rng(0)), [3, 0, 5])
    said = refused({"tree": StoredColumn(column=Tree(size=made.NUM_WORDS))}, {"tree": trees}, tmp_path)
    assert said == ["data, part 0, row 1: its tree has no element; drop the row, or mend it"]


def test_labels_are_as_many_as_the_elements_that_they_label(tmp_path):
    columns = {"text": TOKENS, "marks": MARKS}
    made.written(made.columns(columns, {name: elements(*[2] * 30) for name in columns}), tmp_path / "right")
    said = refused(columns, {"text": elements(1, 2, 3), "marks": elements(1, 3, 2)}, tmp_path / "wrong")
    assert said == [
        f"data, part 0, row {row}: {marks} labels in marks for {words} elements of text; label each element once, or "
        "drop the row"
        for row, marks, words in ((1, 3, 2), (2, 2, 3))
    ]


def test_labels_of_elements_of_one_length_are_as_many_too(tmp_path):
    columns = {"text": StoredColumn(column=Tokens(size=9, length=3), dtype="int32"), "marks": MARKS}
    text = Dense(np.ones((2, 3), np.int32))
    said = refused(columns, {"text": text, "marks": elements(3, 4)}, tmp_path)
    assert said[0].startswith("data, part 0, row 1: 4 labels in marks for 3 elements of text; ")


def test_the_file_of_a_bad_row_is_named(tmp_path):
    source = made.MadeSource({"text": TOKENS}, {"text": elements(1, 0)}, 2)
    parts = {"train": [Part(2, (0, 2), "notes.txt")]}
    with pytest.raises(UserError, match=r"^notes.txt, row 1: its text has no element"):
        made.written(made.MadeSpec(source=_Named(source, parts)), tmp_path)


class _Named:
    """A source whose parts have names."""

    def __init__(self, source: made.MadeSource, pools: dict[str, list[Part]]) -> None:
        self.columns, self.load, self.traits, self.pools = source.columns, source.load, source.traits, pools
