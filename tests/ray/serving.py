"""A server as a user starts it, in processes of its own; and clients of it."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
CLIENTS = 16


class Server:
    """`process` is its driver, `port` where it answers."""

    def __init__(self, process: subprocess.Popen, url: str, token: str | None) -> None:
        self.process, self.url, self.token = process, url, token
        self.port = int(url.rstrip("/").rpartition(":")[2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(self, method: str, path: str, body: Any = None, *, over: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON or text), over a connection of its own or this one."""
        connection = over or self.connect()
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
        if self.token:
            headers = {"authorization": f"Bearer {self.token}", **headers}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if over is None:
            connection.close()
        is_json = answer.headers.get("content-type") == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode()

    def stop(self, what: int = signal.SIGINT) -> int:
        self.process.send_signal(what)
        return self.process.wait(timeout=200)


@contextmanager
def serving(run: object, *options: str, token: str | None = None, **settings: str) -> Iterator[Server]:
    """The command, on a port that the system chooses; ended afterwards, whatever has happened."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_SERVE"))}
    mine |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings}
    mine |= {"MANTA_SERVE_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "jobs", "serve", str(run), "--port", "0", *options]
    process = subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        assert url, process.communicate()[1]
        yield Server(process, url, token)
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        for one in [process, *started]:
            with suppress(psutil.Error, ProcessLookupError):
                one.kill()
        process.wait()


def asked_at_once(server: Server, bodies: Sequence[Any], *, clients: int = CLIENTS) -> list[tuple[int, Any]]:
    """What is answered to each body, from so many clients, each of which keeps its connection."""

    def one(client: int) -> list[tuple[int, Any]]:
        connection = server.connect()
        answers = [server.ask("POST", "/predict", body, over=connection) for body in bodies[client::clients]]
        connection.close()
        return answers

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, range(clients)))
    return [found[place % clients][place // clients] for place in range(len(bodies))]
