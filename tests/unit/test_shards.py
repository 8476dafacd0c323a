"""Shards: what is written is what is read, damage is named, and half a data set is none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.data import prepare as preparing
from cluster.data.layouts import Dense
from cluster.data.manifest import SPLITS, Manifest, StoredColumn
from cluster.data.prepare import cache_key, prepare, prepared
from cluster.data.rows import Rows
from cluster.data.shards import ROW_GROUP_BYTES, DataSet, write_shard
from cluster.data.sources.base import DrawnTestSpec, Part, labels
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import DigitsSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.sources.prepared import ShardsSpec
from cluster.storage import Folder
from nn_models.columns import Features, Numbers
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A prepared data set, not to be changed."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    prepare(DigitsSpec(), Folder(folder))
    return folder


@pytest.fixture
def copy(digits, tmp_path) -> Path:
    """A prepared data set to do damage to."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in digits.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(bytes(content))


# -- what is written is what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images", "features", "numbers"])
def test_round_trip(kind, tmp_path):
    make = {
        "images": lambda: made.images(tmp_path / "in", 400),
        "features": lambda: made.features(tmp_path / "in", 400),
        "numbers": lambda: made.features(tmp_path / "in", 400, target="number"),
    }[kind]
    spec = make()
    inputs, targets = made.source_rows(spec)
    data = made.written(spec, tmp_path / "out")
    seen = []
    for split in SPLITS:
        rows = made.split_rows(data, split)
        numbers = made.number_of(rows.columns["input"].values)
        assert rows.ids.tolist() == list(range(data.manifest.rows(split)))
        np.testing.assert_array_equal(rows.columns["input"].values, inputs[numbers])
        np.testing.assert_array_equal(rows.columns["target"].values, targets[numbers])
        assert rows.columns["input"].values.dtype == inputs.dtype
        seen += numbers.tolist()
    assert sorted(seen) == list(range(400))
    assert {split: data.manifest.rows(split) for split in SPLITS} == {"train": 320, "validation": 40, "test": 40}


def test_row_groups_are_what_the_manifest_says(digits):
    data = DataSet(str(digits))
    for split in SPLITS:
        files = [pq.ParquetFile(digits / shard.file).metadata for shard in data.shards(split)]
        in_files = [file.row_group(group).num_rows for file in files for group in range(file.num_row_groups)]
        assert data.manifest.row_groups(split) == in_files
        assert all(rows <= 2048 for rows in in_files)
        streamed, held = data.read_row_groups(data.row_group_locations(split)), made.split_rows(data, split)
        np.testing.assert_array_equal(streamed.ids, held.ids)
        np.testing.assert_array_equal(streamed.columns["input"].values, held.columns["input"].values)
        np.testing.assert_array_equal(streamed.columns["target"].values, held.columns["target"].values)


@pytest.mark.parametrize(("num_rows", "row_bytes"), [(1, 4), (31, 4), (33, 4), (1000, 4), (100, 300_000), (3, 5 << 20)])
def test_row_groups_are_neither_too_large_nor_too_many(num_rows, row_bytes, tmp_path):
    values = np.zeros((num_rows, row_bytes // 4), np.float32)
    rows = Rows(np.arange(num_rows), {"input": Dense(values), "target": Dense(np.zeros(num_rows, np.int64))})
    columns = {"input": StoredColumn(column=Features(size=row_bytes // 4)), "target": labels(("all",))}
    shard = write_shard(Folder(tmp_path), "a.parquet", rows, columns)
    assert sum(shard.row_groups) == shard.rows == num_rows
    assert max(shard.row_groups) <= max(1, ROW_GROUP_BYTES // row_bytes)
    assert len(shard.row_groups) <= max(24, num_rows * row_bytes // ROW_GROUP_BYTES * 2)


def test_rows_of_several_parts_keep_the_order_of_their_ids(tmp_path):
    spec = made.features(tmp_path / "in", 1000, row_group_size=90)
    data = made.written(spec, tmp_path / "out")
    assert len(data.shards("train")) == 12
    numbers = made.number_of(made.split_rows(data, "train").columns["input"].values)
    assert (np.diff(numbers) > 0).all()


@pytest.mark.parametrize("name", ["with space", "ünï-çødé 数据", "100%20", "a#b?c"])
def test_any_path_will_do(name, tmp_path):
    spec = made.features(tmp_path / name / "in", 60)
    data = made.written(spec, tmp_path / name / "out")
    assert data.manifest.rows("train") == 48
    assert len(made.split_rows(data, "train").ids) == 48


def test_a_file_uri_may_be_written_and_read(tmp_path):
    uri = f"file://{tmp_path}/a%20b/out"
    prepare(made.features(tmp_path / "in", 60), Folder(uri))
    assert (tmp_path / "a b" / "out" / "manifest.json").is_file()
    assert prepared(ShardsSpec(path=uri)).manifest.rows("train") == 48
    assert (Folder(uri) / "ä b").local == tmp_path / "a b" / "out" / "ä b"


def test_a_name_inside_a_uri_goes_before_its_options():
    bucket = Folder("s3://bucket/data?region=eu-central-1&endpoint_override=localhost:9000")
    assert (bucket / "a b").uri == "s3://bucket/data/a%20b?region=eu-central-1&endpoint_override=localhost:9000"
    assert (bucket / "a b").path == "bucket/data/a b"


# -- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_of_images_are_numpys(tmp_path):
    data = made.written(made.images(tmp_path / "in", 500, row_group_size=70), tmp_path / "out")
    pixels, stored = made.split_rows(data, "train").columns["input"].values / 255, data.manifest.columns["input"]
    np.testing.assert_allclose(stored.mean, pixels.mean((0, 2, 3)), rtol=1e-12)  # float64, added up in parts
    np.testing.assert_allclose(stored.std, pixels.std((0, 2, 3)), rtol=1e-12)  # the same


def test_statistics_of_features_are_numpys(tmp_path):
    data = made.written(made.features(tmp_path / "in", 500, row_group_size=70), tmp_path / "out")
    rows, stored = made.split_rows(data, "train").columns["input"].values, data.manifest.columns["input"]
    np.testing.assert_allclose(stored.mean, rows.mean(0, np.float64), rtol=1e-12)  # float64, added up in parts
    np.testing.assert_allclose(stored.std, rows.std(0, np.float64), rtol=1e-12)  # the same


@pytest.mark.parametrize("constant", [0.0, 0.1, -12345.678, 1e-20])
def test_a_constant_feature_is_not_scaled(constant):
    rows = np.full((100_000, 1), constant, np.float32)  # so many that a naive sum of squares is off
    parts = [preparing._moments(part) for part in np.array_split(rows, 7)]
    statistics = preparing._mean_and_std("input", parts, 1.0)
    assert statistics["std"] == (1.0,)
    np.testing.assert_allclose(statistics["mean"], [np.float32(constant)], rtol=1e-9)  # of float64, from float32


@pytest.mark.parametrize(("mean", "std"), [(0, 1e-9), (1e-9, 1e-9), (1e6, 1.0), (0, 1e20)])
def test_any_scale_of_features_is_normalised(mean, std):
    rows = np.random.default_rng(0).normal(mean, std, (50_000, 1)).astype(np.float32)
    parts = [preparing._moments(part) for part in np.array_split(rows, 3)]
    statistics = preparing._mean_and_std("input", parts, 1.0)
    np.testing.assert_allclose(statistics["std"], rows.astype(np.float64).std(0), rtol=1e-9)  # both of float64


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(copy):
    (copy / "train-00000.parquet").unlink()
    with pytest.raises(
        UserError, match=rf"{copy}/train-00000.parquet: the shard is missing; delete {copy} and prepare"
    ):
        DataSet(str(copy))


def test_a_short_shard_is_named(copy):
    file = copy / "test-00000.parquet"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    message = rf"{file}: the shard has {size - 5} bytes where the manifest says {size}; delete"
    with pytest.raises(UserError, match=message):
        DataSet(str(copy))


def test_arrows_threads_are_given_memory_of_arrows_own(digits, monkeypatch):
    # of Python's bytes they could not let go while the interpreter ends, which aborted one process in eight
    data, held, read = DataSet(str(digits)), [], pq.read_table

    def reading(source):
        held.append(pa.total_allocated_bytes() - before)
        return read(source)

    monkeypatch.setattr(pq, "read_table", reading)
    before = pa.total_allocated_bytes()
    data.verify()
    sizes = [shard.bytes for shards in data.manifest.splits.values() for shard in shards]
    assert len(held) == len(sizes)
    assert all(taken >= size for taken, size in zip(held, sizes, strict=True))


def test_a_corrupt_shard_is_named_when_it_is_held(copy):
    data = DataSet(str(copy))
    flip(copy / "train-00000.parquet", 5000)
    with pytest.raises(UserError, match=rf"{copy}/train-00000.parquet: the shard does not have the checksum.*delete"):
        data.table("train")
    with pytest.raises(UserError, match="train-00000"):
        data.verify()
    assert len(data.table("test"))


def test_a_corrupt_shard_is_named_when_it_is_streamed(copy):
    data = DataSet(str(copy))
    flip(copy / "train-00000.parquet", 5000)
    with pytest.raises(UserError, match=rf"{copy}/train-00000.parquet: the shard cannot be read \(.*checksum.*delete"):
        data.read_row_groups(data.row_group_locations("train"))


def test_no_flipped_bit_goes_unnoticed_while_streaming(copy):
    data = DataSet(str(copy))
    file = copy / "test-00000.parquet"
    whole, where = file.read_bytes(), data.row_group_locations("test")
    right = data.read_row_groups(where)
    generator = np.random.default_rng(0)
    footer = range(len(whole) - 1500, len(whole), 17)  # page checksums cover the pages only
    noticed = 0
    for position in [*generator.integers(0, len(whole), 30), *footer]:
        flip(file, position, int(generator.integers(8)))
        said, rows = None, right
        try:
            rows = data.read_row_groups(where)
        except UserError as error:
            said = str(error)
        noticed += said is not None
        assert said is None or str(file) in said
        np.testing.assert_array_equal(rows.ids, right.ids)  # a bit that nobody reads
        np.testing.assert_array_equal(rows.columns["input"].values, right.columns["input"].values)
        np.testing.assert_array_equal(rows.columns["target"].values, right.columns["target"].values)
        file.write_bytes(whole)
    assert noticed > 40


def test_a_shard_that_vanishes_while_streaming_is_named(copy):
    data = DataSet(str(copy))
    (copy / "train-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00000.parquet: the shard cannot be read"):
        data.read_row_groups(data.row_group_locations("train")[:1])


def test_a_missing_manifest_is_named(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=rf"{copy}: no prepared data set here \(manifest.json is missing\).*manta data"):
        DataSet(str(copy))
    with pytest.raises(UserError, match="no prepared data set here"):
        DataSet(str(copy / "nowhere"))


# -- preparing -------------------------------------------------------------------------------------------------------


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


def test_prepared_data_is_not_prepared_again(copy, tmp_path):
    with pytest.raises(UserError, match="shards is prepared already"):
        prepare(ShardsSpec(path=str(copy)), Folder(tmp_path / "out"))


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
publish = preparing._publish

def publish_together(unfinished, folder):
    Path(own).touch()
    for _ in range(1000):
        if Path(other).exists():
            break
        time.sleep(0.01)
    publish(unfinished, folder)

preparing._publish = publish_together
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
