"""Shards: what is written is what is read, and damage is named."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data import prepare as preparing
from cluster.data.layouts import Dense
from cluster.data.manifest import SPLITS, StoredColumn
from cluster.data.prepare import prepare, prepared
from cluster.data.rows import Rows
from cluster.data.shards import ROW_GROUP_BYTES, DataSet, write_shard
from cluster.data.sources.base import labels
from cluster.data.sources.images import DigitsSpec
from cluster.data.sources.prepared import ShardsSpec
from cluster.storage import Folder
from nn_models.columns import Features
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
    data, held, read = DataSet(str(digits)), [], pq.ParquetFile

    def reading(source):
        held.append(pa.total_allocated_bytes() - before)
        return read(source)

    monkeypatch.setattr(pq, "ParquetFile", reading)
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
