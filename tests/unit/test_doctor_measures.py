"""What is measured on a node: real files, a real process group, real steps."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.data.prepare import prepare, prepared
from cluster.group import LOOPBACK
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.submission.doctor.files import Wanted, clear_probe, read_wanted, remove_empty, unseen, write_probe
from cluster.submission.doctor.links import Link, Linked, gathered, measure_links, meeting_point, rounds
from cluster.submission.doctor.machine import CODE, Disk, code_digest, machine
from cluster.submission.doctor.steps import measure_steps
from cluster.training.splits import open_splits

MIB = 1 << 20


def test_a_machine_has_what_it_has():
    found = machine()
    assert {"python", "ray", "torch", "numpy", CODE} <= set(found.versions)
    assert found.cores == len(psutil.Process().cpu_affinity())
    assert found.temporary is not None
    assert 0 < found.temporary.free <= found.temporary.total
    assert bool(found.gpus) != bool(found.gpu_problem)


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path):
    found = Disk.of(tmp_path / "not" / "there")
    assert found is not None
    assert found.total == shutil.disk_usage(tmp_path).total


def test_a_digest_of_code_tells_checkouts_apart(tmp_path: Path):
    for name in ("one", "other"):
        for package in ("nn_models", "cluster", "jobs"):
            (tmp_path / name / package).mkdir(parents=True)
            (tmp_path / name / package / "__init__.py").write_text("")
    (tmp_path / "other" / "jobs" / "notes.txt").write_text("not code")
    assert code_digest(tmp_path / "one") == code_digest(tmp_path / "other")
    (tmp_path / "other" / "jobs" / "__init__.py").write_text("#")
    assert code_digest(tmp_path / "one") != code_digest(tmp_path / "other")


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_one_node_writes_another_reads_and_nothing_is_left(tmp_path: Path):
    where = str(tmp_path / "runs" / "mine")
    for name in ("node-0", "node-1"):
        written = write_probe(where, "key", name, MIB)
        assert written.problem is None
        assert written.bytes_per_s > 0
        assert written.free_bytes
        if name == "node-0":
            made = written.made
    assert made == (where, str(tmp_path / "runs"))
    assert unseen(where, "key", ["node-0", "node-1"], patience_s=0) == []
    assert unseen(where, "key", ["node-0", "node-2"], patience_s=0) == ["node-2"]
    assert unseen(str(tmp_path / "elsewhere"), "key", ["node-0"], patience_s=0) == ["node-0"]
    clear_probe(where, "key", "node-0")
    clear_probe(where, "key")
    clear_probe(where, "key")  # another node was first
    remove_empty(made)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_there_stay(tmp_path: Path):
    assert write_probe(str(tmp_path), "key", "node-0", MIB).made == ()


def test_storage_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    written = write_probe(str(tmp_path / "file"), "key", "node-0", MIB)
    assert written.problem is not None
    assert written.problem.startswith(f"{tmp_path / 'file'}: cannot be written (")
    assert written.fix


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The device that every write to fails as on a full disk."""

    def full(path: Path, content: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(content)

    monkeypatch.setattr(Path, "write_bytes", full)
    written = write_probe(str(tmp_path), "key", "node-0", MIB)
    assert (written.fix, "No space left on device" in str(written.problem)) == ("make room there", True)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    prepare(load_recipe("digits-mlp").data, Folder(tmp_path / "data"))
    return tmp_path / "data"


def test_prepared_data_is_read(stored: Path):
    found = read_wanted(Wanted(str(stored)))
    assert found.problem is None
    assert found.bytes_per_s
    assert found.bytes_per_s > 0


def test_data_that_is_missing_short_or_corrupt(stored: Path, tmp_path: Path):
    shard = stored / "train-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "checksum" in str(read_wanted(Wanted(str(stored))).problem)
    shard.write_bytes(whole[:-1])
    assert f"{shard}: the shard has {len(whole) - 1} bytes" in str(read_wanted(Wanted(str(stored))).problem)
    shard.unlink()
    missing = read_wanted(Wanted(str(stored)))
    assert missing.problem == f"{shard}: the shard is missing"
    assert missing.fix
    shutil.rmtree(stored)
    assert read_wanted(Wanted(str(stored))).problem
    vectors = read_wanted(Wanted(files=(str(tmp_path / "vectors.txt"),)))
    assert vectors.problem == f"{tmp_path / 'vectors.txt'}: No such file or directory"


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", range(1, 9))
def test_each_neighbour_on_the_ring_once_and_no_rank_twice_at_a_time(world_size: int):
    found = rounds(world_size)
    pairs = [pair for of_round in found for pair in of_round]
    ring = {frozenset((rank, (rank + 1) % world_size)) for rank in range(world_size)} if world_size > 1 else set()
    assert {frozenset(pair) for pair in pairs} == ring
    assert len(pairs) == len(ring)
    assert len(found) <= 3
    for of_round in found:
        ranks = [rank for pair in of_round for rank in pair]
        assert len(ranks) == len(set(ranks))


def peer(meeting: str, rank: int, world_size: int, told: Any) -> None:
    options = {"world_size": world_size, "address": LOOPBACK, "backend": "gloo", "num_bytes": MIB}
    found = measure_links(meeting, rank, **options)
    told.put(json.dumps([rank, vars(found) | {"links": [vars(link) for link in found.links]}]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_links_of_a_real_group(world_size: int):
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    meeting = meeting_point(LOOPBACK)
    peers = [context.Process(target=peer, args=(meeting, rank, world_size, told)) for rank in range(world_size)]
    for process in peers:
        process.start()
    found: Mapping[int, Any] = dict(json.loads(told.get()) for _ in peers)
    for process in peers:
        process.join()
    assert [process.exitcode for process in peers] == [0] * world_size
    ranks = [found[rank] for rank in range(world_size)]
    linked = gathered([Linked(**one | {"links": tuple(Link(**link) for link in one["links"])}) for one in ranks])
    assert sorted((link.first, link.second) for link in linked.links) == sorted(
        pair for of_round in rounds(world_size) for pair in of_round
    )
    figures = [linked.joined_s, linked.all_reduce_s, linked.small_all_reduce_s]
    figures += [figure for link in linked.links for figure in (link.latency_s, link.bytes_per_s)]
    assert all(figure > 0 for figure in figures)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-mlp", "digits-dcgan", "rows-lstm", "adding-gru"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_steps_of_a_recipe(name: str, replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.submission.doctor.steps.STEPS_S", 0.0)
    overrides = {"data.rows": 300} if name == "adding-gru" else {}
    if name == "rows-lstm":
        overrides = {"data": {"kind": "digits"}}
    recipe = load_recipe(name, overrides)
    splits = open_splits(prepared(recipe.data), window=recipe.data.shuffle_window)
    found = measure_steps(recipe, splits, replicas=replicas, threads=0, use_gpu=False)
    assert found.first_s > 0
    assert found.each_s > 0
    assert os.listdir(tmp_path) == []
