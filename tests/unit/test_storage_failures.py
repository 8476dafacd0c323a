"""Storage that fails in mid-run: one line with path and fix, and the run goes on once the storage is back."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs
from safetensors.torch import load

import cluster
from cluster import storage
from cluster.data.prepare import prepare, prepared
from cluster.data.shards import DataSet
from cluster.data.sources.images import DigitsSpec
from cluster.errors import StorageFailed
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import read_best
from cluster.training.journal import Journal
from cluster.training.run_directory import RunDirectory
from nn_models.errors import UserError

RECIPE = {
    "name": "small",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "train": {"epochs": 4, "global_batch_size": 256},
}


@contextmanager
def full_disk(*, bytes_a_file: int) -> Iterator[None]:
    """Files that grow past a size fail as on a disk without room (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Store(MemoryFileSystem):
    """An object store in memory that answers until so many files have been written to it."""

    store: dict = {}  # noqa: RUF012  # fsspec's own is one for all instances
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    left = 10**9

    def _answer(self) -> None:
        if self.left <= 0:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: Couldn't connect to server")

    def _open(self, path, mode="rb", **options):
        self._answer()
        self.left -= mode == "wb"
        return super()._open(path, mode, **options)

    def info(self, path, **options):
        self._answer()
        return super().info(path, **options)


@pytest.fixture
def store(monkeypatch):
    """Every URI leads to one store."""
    found = Store()
    found.store.clear()
    remote, local = fs.PyFileSystem(fs.FSSpecHandler(found)), fs.FileSystem.from_uri

    def from_uri(uri):
        return (remote, uri.partition("://")[2]) if "://" in uri else local(uri)

    monkeypatch.setattr(storage.fs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return weights(cluster.train(RECIPE, run=str(tmp_path_factory.mktemp("whole") / "run")).run)


def weights(run: str | Folder) -> dict[str, torch.Tensor]:
    return load((Folder(run) / "model").read_bytes("model.safetensors"))


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def one_line(error: pytest.ExceptionInfo[StorageFailed], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("files", [3, 5, 7, 9])
def test_a_store_that_goes_away_ends_a_run_that_goes_on_later(store, undisturbed, files):
    store.left = files
    with pytest.raises(StorageFailed) as error:
        cluster.train(RECIPE, run="s3://bucket/run")
    one_line(error, "s3://bucket/run", "Couldn't connect", "check that it can be reached", "--resume")
    store.left = 10**9
    assert cluster.train(RECIPE, run="s3://bucket/run", resume=True).status == "finished"
    assert same(weights("s3://bucket/run"), undisturbed)


def test_a_store_that_is_absent_is_named_and_nothing_is_said_of_going_on(store):
    store.left = 0
    with pytest.raises(StorageFailed) as error:
        cluster.train(RECIPE, run="s3://bucket/run")
    one_line(error, "s3://bucket/run", "check that it can be reached")
    assert "--resume" not in str(error.value)


def test_a_store_of_data_that_goes_away_is_not_called_damaged(store):
    prepare(DigitsSpec(), Folder("s3://bucket/data"))
    data = DataSet("s3://bucket/data")
    store.left = 0
    with pytest.raises(StorageFailed, match=r"s3://bucket/data/train-00000\.parquet"):
        data.read_row_groups(data.row_group_locations("train")[:1])


def test_a_full_disk_ends_a_run_that_goes_on_later(tmp_path, undisturbed):
    run = tmp_path / "run"
    with full_disk(bytes_a_file=6_000), pytest.raises(StorageFailed) as error:
        cluster.train(RECIPE, run=str(run))
    one_line(
        error, str(run), "cannot be written", "make room there", f"manta train {run}/recipe.yaml --run {run} --resume"
    )
    assert RunDirectory(str(run)).result()["status"] == "failed"
    assert cluster.train(RECIPE, run=str(run), resume=True).status == "finished"
    assert same(weights(str(run)), undisturbed)


def test_a_line_of_metrics_that_finds_no_room_is_named(tmp_path):
    journal = Journal(Folder(tmp_path), ["loss"])
    journal.open(began=0.0)
    journal.log("train", {"loss": 1.0})
    with full_disk(bytes_a_file=100), pytest.raises(StorageFailed, match=r"metrics\.jsonl: cannot be written"):
        journal.log("train", {"loss": 1.0})
    journal.close()


def test_a_full_disk_is_named_when_data_is_prepared(tmp_path, monkeypatch):
    with full_disk(bytes_a_file=6_000), pytest.raises(StorageFailed) as error:
        prepare(DigitsSpec(), Folder(tmp_path / "out"))
    one_line(error, str(tmp_path / "out"), "make room there")
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    with full_disk(bytes_a_file=6_000), pytest.raises(StorageFailed) as error:
        prepared(DigitsSpec())
    one_line(error, str(tmp_path / "cache"), "make room there")
    assert list((tmp_path / "cache" / "data").iterdir()) == []  # nothing that looks like data is left


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_whose_directory_is_taken_away_says_so_and_makes_no_other(tmp_path, monkeypatch, undisturbed, epoch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    validated = Journal.validated

    def taking_away(journal: Journal, *what, **more):
        if journal.progress.epoch == epoch:
            shutil.move(run, elsewhere)
        validated(journal, *what, **more)

    monkeypatch.setattr(Journal, "validated", taking_away)
    with pytest.raises(StorageFailed) as error:
        cluster.train(RECIPE, run=str(run))
    one_line(error, str(run), "put back what was deleted", "--resume")
    assert not run.exists()  # no half of a run
    monkeypatch.undo()
    shutil.move(elsewhere, run)
    assert cluster.train(RECIPE, run=str(run), resume=True).status == "finished"
    assert same(weights(str(run)), undisturbed)


def test_only_an_anchored_folder_stays_gone(tmp_path):
    folder = (Folder(tmp_path / "run").create().anchored()) / "checkpoints"
    folder.write_text("a", "there")
    assert Path(tmp_path, "run", "checkpoints", "a").read_text() == "there"
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StorageFailed, match="checkpoints/a"):
        folder.write_text("a", "gone")
    with pytest.raises(StorageFailed):
        folder.create()
    assert not (tmp_path / "run").exists()
    Folder(tmp_path / "run" / "checkpoints").write_text("a", "made")
    assert (tmp_path / "run" / "checkpoints" / "a").exists()


@pytest.mark.parametrize("kind", ["image_folder", "parquet", "text"])
def test_a_path_that_can_be_no_path_is_told_in_one_line(kind):
    path = "/tmp/" + "a" * 10_000
    fields = {"input": "a", "target": "b"} if kind == "parquet" else {}
    recipe = load_recipe({"model": {"kind": "mlp"}, "data": {"kind": kind, "path": path, **fields}})
    with pytest.raises(UserError, match="aaaa"):
        prepared(recipe.data)


def test_a_head_of_weights_that_says_any_length_is_no_head(tmp_path):
    Folder(tmp_path / "model").create().write_bytes("model.safetensors", b"\xff" * 16)
    assert read_best(Folder(tmp_path)) is None
