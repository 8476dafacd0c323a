"""A prepared data set that travels to a node which has no file of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.data.prepare import prepare
from cluster.data.shards import DataSet
from cluster.data.shipment import Shipment, lies_at, shards_of
from cluster.data.sources.images import DigitsSpec
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.splits import Splits, open_splits
from nn_models.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSet:
    folder = tmp_path_factory.mktemp("here") / "data"
    prepare(DigitsSpec(), Folder(folder))
    return DataSet(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Another node's."""
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


class Fetch:
    """What the object store would give, and how often it was asked."""

    def __init__(self, data: DataSet) -> None:
        self.contents = {
            s.file: np.frombuffer(data.folder.read_bytes(s.file), np.uint8) for s in shards_of(data.manifest)
        }
        self.asked: list[str] = []

    def __call__(self, name: str) -> Any:
        self.asked.append(name)
        return self.contents[name]


def elsewhere(data: DataSet) -> tuple[Shipment, Fetch]:
    """A shipment of data that is not seen where it is said to lie."""
    fetch = Fetch(data)
    return Shipment("/not/there", data.manifest, fetch), fetch


def test_it_arrives_once_with_the_same_bytes(data, cache):
    shipment, fetch = elsewhere(data)
    arrived = shipment.arrived()
    assert arrived.manifest == data.manifest
    assert Path(arrived.folder.path).parent == cache
    arrived.verify()
    names = [shard.file for shard in shards_of(data.manifest)]
    assert fetch.asked == names
    assert shipment.arrived().folder.uri == arrived.folder.uri
    assert fetch.asked == names
    assert [path.name for path in cache.iterdir()] == [Path(arrived.folder.path).name]


def test_what_is_seen_here_does_not_travel(data, cache):
    fetch = Fetch(data)
    assert Shipment(data.folder.uri, data.manifest, fetch).arrived().folder.uri == data.folder.uri
    assert not fetch.asked
    assert not cache.exists()


def test_another_data_set_in_its_place_is_not_taken_for_it(data, cache, tmp_path):
    prepare(DigitsSpec(validation_fraction=0.3), Folder(tmp_path / "other"))
    assert not lies_at(str(tmp_path / "other"), data.manifest)
    arrived = Shipment(str(tmp_path / "other"), data.manifest, Fetch(data)).arrived()
    assert arrived.manifest == data.manifest


def test_a_set_whose_shard_is_gone_is_not_taken_for_whole(data, cache, tmp_path):
    prepare(DigitsSpec(), Folder(tmp_path / "short"))
    assert lies_at(str(tmp_path / "short"), data.manifest)
    next((tmp_path / "short").glob("train-*.parquet")).unlink()
    assert not lies_at(str(tmp_path / "short"), data.manifest)


def test_a_shard_that_comes_damaged_is_named_and_not_kept(data, cache):
    shipment, fetch = elsewhere(data)
    name = shards_of(data.manifest)[0].file
    damaged = fetch.contents[name].copy()
    damaged[len(damaged) // 2] ^= 0xFF
    whole, fetch.contents[name] = fetch.contents[name], damaged
    with pytest.raises(UserError, match=f"/not/there/{name}: the shard does not have the checksum"):
        shipment.arrived()
    fetch.contents[name] = whole
    shipment.arrived().verify()  # what was left of the first attempt does no harm


def test_what_an_ended_process_has_left_is_completed(data, cache):
    shipment, _ = elsewhere(data)
    name = Path(shipment.arrived().folder.path)
    half = name.with_name(f".{name.name}")
    name.rename(half)
    (half / "manifest.json").unlink()
    next(half.glob("*.parquet")).write_bytes(b"half")
    shipment.arrived().verify()
    assert not half.exists()


SEVERAL = """
import sys
from cluster.data.shards import DataSet
from cluster.data.shipment import Shipment
data = DataSet(sys.argv[1])
fetched = []
def fetch(name):
    fetched.append(name)
    return data.folder.read_bytes(name)
Shipment("/not/there", data.manifest, fetch).arrived().verify()
print(len(fetched))
"""


def test_of_several_processes_of_a_node_one_writes(data, cache):
    processes = [
        subprocess.Popen([sys.executable, "-c", SEVERAL, data.folder.path], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    fetched = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(fetched) == [0, 0, len(shards_of(data.manifest))]


def test_a_streamed_run_reads_what_has_arrived(data, cache):
    """The same rows in the same order, whatever the place that they are read from."""
    recipe = load_recipe(
        {
            "name": "streamed",
            "model": {"kind": "mlp", "hidden": [8]},
            "data": {"kind": "shards", "path": data.folder.path, "shuffle_window": 100},
            "train": {"global_batch_size": 64},
        }
    )
    shipment, fetch = elsewhere(data)
    here = open_splits(data, window=100)
    there = Splits(here.manifest, "/not/there", here.tables, shipment)
    place = {"rank": 1, "world_size": 2, "device": torch.device("cpu")}
    wanted, found = (splits.training(recipe, **place) for splits in (here, there))
    for one, other in zip(wanted.batches(0), found.batches(0), strict=True):
        assert np.array_equal(one[0].place.ids, other[0].place.ids)
        assert torch.equal(one[0]["input"], other[0]["input"])
    assert fetch.asked
