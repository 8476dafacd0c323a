"""Whether the raylet and the GCS that a driver hangs on still answer."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.errors import RayLost
from cluster.runtime import RaySession, lifeline
from cluster.runtime.lifeline import Lifeline


@pytest.fixture
def node(tmp_path):
    """Sockets like those of a node's raylet and a cluster's GCS, and a module that is connected to them."""
    raylet, gcs = socket.socket(socket.AF_UNIX), socket.socket()
    raylet.bind(str(tmp_path / "raylet"))
    gcs.bind(("127.0.0.1", 0))
    for listening in (raylet, gcs):
        listening.listen()
    here = SimpleNamespace(raylet_socket_name=str(tmp_path / "raylet"), gcs_address=f"127.0.0.1:{gcs.getsockname()[1]}")
    ray = SimpleNamespace(_private=SimpleNamespace(worker=SimpleNamespace(_global_node=here)))
    yield SimpleNamespace(ray=ray, raylet=raylet, gcs=gcs, path=Path(here.raylet_socket_name))
    raylet.close()
    gcs.close()


@pytest.mark.parametrize(("dies", "named"), [("raylet", "raylet"), ("gcs", "GCS")])
def test_what_has_died_is_named(node, dies, named):
    line = Lifeline(node.ray, embedded=True)
    assert line.broken() is None
    getattr(node, dies).close()
    assert line.broken() == f"Ray's {named} has died"


def test_a_socket_that_is_gone_is_a_death(node):
    line = Lifeline(node.ray, embedded=True)
    node.path.unlink()
    assert line.broken() == "Ray's raylet has died"


def test_a_clusters_gcs_may_come_back(node, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lifeline, "time", SimpleNamespace(monotonic=lambda: now[0]))
    line = Lifeline(node.ray, embedded=False)
    place = node.gcs.getsockname()
    node.gcs.close()
    assert line.broken() is None
    now[0] = lifeline.CLUSTER_PATIENCE_S - 1
    assert line.broken() is None
    with socket.create_server(place):
        assert line.broken() is None
    now[0] += 2
    assert line.broken() is None  # counted anew
    now[0] += lifeline.CLUSTER_PATIENCE_S
    assert line.broken() == "Ray's GCS has died"


def test_only_a_ray_of_our_own_is_started_anew(node, caplog):
    started = []

    def start() -> Lifeline:
        started.append(True)
        with socket.create_server(node.gcs_place):
            return Lifeline(node.ray, embedded=True)

    node.gcs_place = node.gcs.getsockname()
    session = RaySession(node.ray, embedded=True, lifeline=Lifeline(node.ray, embedded=True), start=start)
    session.revive()
    assert not started
    node.gcs.close()
    with pytest.raises(RayLost, match="Ray's GCS has died"):
        session.refuse_lost()
    session.revive()
    assert started == [True]
    assert "Ray's GCS has died; it is started anew" in caplog.text
    session.start = None
    with pytest.raises(RayLost, match="Ray's GCS has died"):
        session.revive()


def test_a_ray_that_does_not_come_up_again_is_lost(node):
    def start() -> Lifeline:
        raise ValueError("no room\nat all")

    session = RaySession(node.ray, embedded=True, lifeline=Lifeline(node.ray, embedded=True), start=start)
    node.raylet.close()
    with pytest.raises(RayLost, match=r"raylet has died, and could not be started anew \(no room\)"):
        session.revive()
