"""What nodes see of a run's files, as far as no node is needed to say so: questions, and what follows from answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.data.prepare import prepare
from cluster.data.shards import DataSet
from cluster.data.sources.images import DigitsSpec
from cluster.errors import StorageFailed
from cluster.runs import sharing
from cluster.runtime import RaySession, Workers, nodes
from cluster.runtime.nodes import Node
from cluster.storage import Folder
from cluster.training.splits import open_splits
from nn_models.errors import UserError

HERE = Node("a" * 56, "10.0.0.1", {"CPU": 4.0, "object_store_memory": 1e9})
SMALL = Node("b" * 56, "10.0.0.2", {"CPU": 1.0})
LARGE = Node("c" * 56, "10.0.0.3", {"CPU": 8.0})


class Ray:
    """As much of Ray as is asked here."""

    ObjectRef = Any

    def __init__(self, *alive: Node) -> None:
        self.alive = alive
        self.objects: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": node.id, "NodeManagerAddress": node.address, "Resources": node.resources, "Alive": True}
            for node in self.alive
        ]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: HERE.id)

    def put(self, value: Any) -> int:
        self.objects.append(value)
        return len(self.objects) - 1


def session(*alive: Node, embedded: bool = False) -> RaySession:
    return RaySession(Ray(*alive), embedded=embedded)


def answering(monkeypatch: pytest.MonkeyPatch, answers: dict[Node, Any]) -> list[Any]:
    """Have nodes give these answers; what they were asked."""
    asked: list[Any] = []

    def ask_each(ray: Any, found: list[Node], question: Any, *arguments: Any) -> dict[Node, Any]:
        asked.append((question.__name__, *arguments))
        return {node: answers[node] for node in found if node in answers}

    for module in (nodes, sharing):
        monkeypatch.setattr(module, "ask_each", ask_each)
    return asked


# -- who is asked ------------------------------------------------------------------------------------------------------


def test_only_other_nodes_with_room_for_a_worker_are_asked():
    workers = Workers(2, 2, 2, use_gpu=False)
    assert sharing.other_nodes(session(HERE, SMALL, LARGE), workers) == [LARGE]
    assert sharing.other_nodes(session(HERE), workers) == []
    assert sharing.other_nodes(session(HERE, LARGE, embedded=True), workers) == []


def test_nobody_is_asked_of_what_is_no_local_directory(monkeypatch):
    asked = answering(monkeypatch, {})
    sharing.refuse_unshared(session(HERE, LARGE), [LARGE], Folder("mock:///run"))
    assert asked == []


# -- a run's directory -------------------------------------------------------------------------------------------------


def test_a_directory_that_is_seen_and_written_is_well(tmp_path):
    folder = Folder(tmp_path)
    folder.write_text(".seen", "token")
    assert nodes._seen(folder.uri, ".seen", "token") is None
    assert [path.name for path in tmp_path.iterdir()] == [".seen"]


def test_a_directory_with_other_content_is_another(tmp_path):
    folder = Folder(tmp_path)
    folder.write_text(".seen", "other")
    assert nodes._seen(folder.uri, ".seen", "token") == "sees another folder there"
    assert nodes._seen((folder / "absent").uri, ".seen", "token") == "does not see it"


def test_a_directory_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    folder.write_text(".seen", "token")

    def full(self: Folder, name: str, content: str) -> None:
        raise StorageFailed(f"{self}: cannot be written (No space left on device); make room there")

    monkeypatch.setattr(Folder, "write_text", full)
    assert "No space left on device" in str(nodes._seen(folder.uri, ".seen", "token"))


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_that_others_do_not_see_is_refused_and_left_as_it_was(monkeypatch, tmp_path, there):
    run = tmp_path / "run"
    if there:
        run.mkdir()
    answering(monkeypatch, {SMALL: None, LARGE: "does not see it"})
    with pytest.raises(UserError) as caught:
        sharing.refuse_unshared(session(HERE, SMALL, LARGE), [SMALL, LARGE], Folder(run))
    assert caught.value.path == "--run"
    assert str(caught.value.message).endswith("all nodes that may train: 10.0.0.3 (cccccccc) does not see it")
    assert "MANTA_STORAGE" in str(caught.value.fix)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] * there
    assert not there or not list(run.iterdir())


# -- prepared files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSet:
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare(DigitsSpec(), Folder(folder))
    return DataSet(folder)


def test_files_that_all_see_do_not_travel(monkeypatch, data):
    asked = answering(monkeypatch, {LARGE: True})
    splits = open_splits(data, window=100)
    assert sharing.reaching(session(HERE, LARGE), [LARGE], data, splits) is splits
    assert asked == [("lies_at", data.folder.uri, data.manifest)]


@pytest.mark.parametrize("answer", [{LARGE: False}, {LARGE: OSError("stale handle")}, {}])
def test_files_that_one_does_not_see_are_put_into_the_store_once(monkeypatch, data, answer):
    answering(monkeypatch, {SMALL: True, **answer})
    there = session(HERE, SMALL, LARGE)
    splits = sharing.reaching(there, [SMALL, LARGE], data, open_splits(data, window=100))
    assert splits.shipment is not None
    assert splits.shipment.where == data.folder.uri
    shards = [shard for shards in data.manifest.splits.values() for shard in shards]
    assert [len(content) for content in there.ray.objects] == [shard.bytes for shard in shards]


def test_more_than_the_store_takes_is_refused(monkeypatch, data):
    answering(monkeypatch, {LARGE: False})
    tiny = Node(HERE.id, HERE.address, {"object_store_memory": 1000.0})
    with pytest.raises(UserError, match=r"are not seen on 10\.0\.0\.3 \(cccccccc\), and .* travel through the object"):
        sharing.reaching(session(tiny, LARGE), [LARGE], data, open_splits(data, window=100))
    assert Path(data.folder.path).exists()
