"""`manta serve` as people meet it: many clients, replicas, another run swapped in, loopback, a browser, Ctrl-C."""

import base64
import io
import os
import signal
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import cluster
from cluster.data.prepare import prepared
from cluster.data.rows import table_rows
from cluster.recipe.loading import load_recipe
from tests.ray.browser import PROGRAM, page_at
from tests.ray.faults import wait_for
from tests.ray.serving import asked_at_once, serving
from tests.ray.test_embedded import alive, is_loopback, title, tree

TOKEN = "the token of this test"
NUM_REQUESTS = 1000


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    folder, few = tmp_path_factory.mktemp("runs"), {"train.epochs": 3}
    return {name: cluster.train(f"digits-{name}", overrides=few, run=str(folder / name)).run for name in ("cnn", "mlp")}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    data = prepared(load_recipe("digits-mlp").data)
    return table_rows(data.table("train"), data.manifest).columns["input"].values[:NUM_REQUESTS]


@pytest.fixture(scope="module")
def place():
    """Where Ray's files go: its sockets' paths are too long for pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(runs, place):
    with serving(runs["cnn"], "--replicas", "2", token=TOKEN, RAY_TMPDIR=str(place)) as server:
        yield server


def answers_of(run: str, pixels: np.ndarray) -> tuple[list[str], list[float]]:
    model = cluster.open_model(run)
    return model.predict(pixels), model(pixels).softmax(1).max(1).values.tolist()


def check(told: list[tuple[int, dict]], classes: list[str], chances: list[float]) -> None:
    assert [status for status, _ in told] == [200] * len(told)
    found = [answer["predictions"][0] for _, answer in told]
    assert [answer["class"] for answer in found] == classes
    # float32 in batches of other sizes
    assert [answer["probability"] for answer in found] == pytest.approx(chances, abs=1e-5)


def test_a_thousand_requests_of_sixteen_clients_are_all_answered_right(server, runs, pixels):
    told = asked_at_once(server, [{"rows": [row.tolist()]} for row in pixels])
    assert len(told) == NUM_REQUESTS
    check(told, *answers_of(runs["cnn"], pixels))
    _, metrics = server.ask("GET", "/metrics")
    (line,) = [line for line in metrics.splitlines() if line.startswith('manta_requests_total{status="200"}')]
    assert float(line.split()[1]) >= NUM_REQUESTS  # of both replicas
    passes, rows = (
        float(line.split()[1])
        for name in ("count", "sum")
        for line in metrics.splitlines()
        if line.startswith(f"manta_batch_rows_{name}")
    )
    assert passes < rows  # some were answered together


def test_all_that_listens_is_on_loopback(server):
    found = []
    for process in tree(server.process):
        with suppress(psutil.Error):
            opened = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            found += [(title(process), connection.laddr.ip, connection.laddr.port) for connection in opened]
    assert sum(port == server.port for *_, port in found) == 2  # a replica each
    assert [one for one in found if not is_loopback(one[1])] == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"x" * (17 << 20), "application/json", 413),
        (b'{"rows": [["a"]]}', "application/json", 422),
        (b"abc", "image/png", 422),
        (b"a,b", "text/csv", 415),
    ],
)
def test_what_is_wrong_is_refused_and_serving_goes_on(server, body, kind, status):
    try:
        found, told = server.ask("POST", "/predict", body, **{"content-type": kind})
    except (ConnectionError, BrokenPipeError):  # it answers what is too large before all of it has been sent
        assert status == 413
    else:
        assert found == status, told
        assert set(told["error"]) == {"path", "message", "fix"}
    assert server.ask("GET", "/health") == (200, {"status": "ok"})


def test_without_the_token_nothing_is_told(server):
    status, told = server.ask("POST", "/predict", {"rows": []}, authorization="Bearer another")
    assert (status, told["error"]["path"]) == (401, "authorization")


def test_another_run_is_swapped_in_without_a_request_being_dropped(server, runs, pixels):
    of_run = {run: answers_of(run, pixels[:100]) for run in runs.values()}
    over, told = threading.Event(), []

    def ask() -> None:
        connection = server.connect()
        while not over.is_set():
            row = len(told) % 100
            told.append((row, server.ask("POST", "/predict", {"rows": [pixels[row].tolist()]}, over=connection)))
        connection.close()

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    wait_for(lambda: len(told) > 50)
    status, described = server.ask("POST", "/model", {"run": runs["mlp"]})
    assert (status, described["run"], described["model"]) == (200, runs["mlp"], "mlp")
    after = [server.ask("GET", "/model")[1]["run"] for _ in range(20)]  # of a connection each, so of both replicas
    seen = len(told)
    wait_for(lambda: len(told) > seen + 50)
    over.set()
    for client in clients:
        client.join()
    assert after == [runs["mlp"]] * 20
    assert {status for _, (status, _) in told} == {200}
    assert {answer["run"] for _, (_, answer) in told} == set(runs.values())
    for row, (_, answer) in told:
        classes, chances = of_run[answer["run"]]
        (found,) = answer["predictions"]
        assert found["class"] == classes[row]
        assert found["probability"] == pytest.approx(chances[row], abs=1e-5)  # float32 in batches of other sizes
    status, refused = server.ask("POST", "/model", {"run": runs["mlp"] + "-not"})
    assert status == 422
    assert refused["error"]["path"].endswith("mlp-not")


def test_a_replica_that_dies_is_replaced_by_one_of_the_run_served_now(server, runs):
    listening = [one for one in tree(server.process) if "ServeReplica" in title(one)]
    assert len(listening) == 2
    now = server.ask("GET", "/model")[1]["run"]
    listening[0].kill()
    listening[0].wait()

    def both_answer() -> bool:
        with suppress(OSError, psutil.Error):
            ports = [
                connection.laddr.port
                for one in tree(server.process)
                for connection in one.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
            return ports.count(server.port) == 2
        return False

    wait_for(both_answer)
    assert [server.ask("GET", "/model")[1]["run"] for _ in range(10)] == [now] * 10


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser_predicts_pictures_and_drawings(server, pixels, tmp_path):
    picture = io.BytesIO()
    Image.fromarray(pixels[0, 0]).save(picture, "PNG")
    content = base64.b64encode(picture.getvalue()).decode()
    served = server.ask("GET", "/model")[1]
    classes, _ = answers_of(served["run"], pixels[:1])
    with page_at(server.url, tmp_path) as page:

        def wait(script: str) -> None:
            wait_for(lambda: page.run(script), 60)

        wait("document.getElementById('key')?.hidden === false")  # it asks for the token
        assert page.run("document.body.textContent.includes('digits')") is False
        page.run(f"document.getElementById('token').value = '{TOKEN}'; document.getElementById('enter').click()")
        wait("document.body.dataset.ready === 'yes'")
        assert page.run("document.getElementById('key').hidden") is True
        assert page.run("document.getElementById('name').textContent") == served["name"]
        page.run(  # a picture is dropped
            f"""const bytes = Uint8Array.from(atob("{content}"), one => one.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], "digit.png", {{type: "image/png"}}));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: dropped}}));"""
        )
        wait(f"document.body.dataset.answered === '{classes[0]}'")
        page.run("delete document.body.dataset.answered")
        left, top = page.run("(({x, y}) => [x, y])(document.getElementById('canvas').getBoundingClientRect())")
        page.drag(*[(left + 112, top + height) for height in range(30, 200, 10)])  # a one
        page.run("document.getElementById('draw').click()")
        wait("document.body.dataset.answered")
        assert page.run("document.querySelectorAll('.bar').length") == 5
        drawn = base64.b64decode(page.run("canvas.toDataURL('image/png').split(',')[1]"))
        wanted = server.ask("POST", "/predict", drawn, **{"content-type": "image/png"})[1]["predictions"][0]["class"]
        assert page.run("document.body.dataset.answered") == wanted
        page.run("picture(new File(['no picture'], 'a.png', {type: 'image/png'}))")
        wait("document.getElementById('error').textContent.includes('no known image format')")
        if shown := os.environ.get("MANTA_TEST_PICTURES"):
            Path(shown).write_bytes(page.picture())


def test_ctrl_c_answers_what_has_begun_and_leaves_nothing(server, place, pixels):
    processes = tree(server.process)
    slow = socket.create_connection(("127.0.0.1", server.port))
    body = b'{"rows": ' + str([pixels[0].tolist()]).encode() + b"}"
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n"
    slow.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:20])
    time.sleep(0.5)  # a replica has its head
    server.process.send_signal(signal.SIGINT)

    def refuses() -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
            return False
        return True

    wait_for(refuses)
    slow.sendall(body[20:])
    slow.settimeout(60)
    answer = slow.recv(1 << 16)
    slow.close()
    assert answer.startswith(b"HTTP/1.1 200 OK"), answer
    assert server.process.wait(timeout=120) == 130
    assert server.process.stderr.read().splitlines()[-1] == "stopped"
    with suppress(AssertionError):
        wait_for(lambda: not alive(processes), 60)
    assert alive(processes) == []
    assert list(place.iterdir()) == []
