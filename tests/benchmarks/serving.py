"""`manta serve` against a minimal FastAPI server around the same model: requests per second of 16 clients, p50, p99.

All servers stay up; the clients ask one after the other, 1,000 requests of a digit each time, and check every answer.
"""

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import cluster
from cluster.data.prepare import prepared
from cluster.data.rows import table_rows
from cluster.recipe.loading import load_recipe
from tests.benchmarks.measuring import BY_HAND, Case, in_turn, options, publish, scratch

CLIENTS = 16
WAYS = {"def": "an endpoint of threads", "async": "an endpoint of the event loop"}


@contextmanager
def started(*command: object) -> Iterator[subprocess.Popen]:
    """A server in a process of its own, with a thread for the model as `manta serve`'s replica has."""
    here = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MANTA_SERVE_TOKEN")}
    here |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_it_answers(port: int) -> None:
    for _ in range(600):
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.2)
    raise SystemExit(f"nothing answers at port {port}")


def requests_of(pixels: np.ndarray) -> list[bytes]:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    bodies = [json.dumps({"rows": [row.tolist()]}).encode() for row in pixels]
    return [head % len(body) + body for body in bodies]


async def asked(port: int, requests: Sequence[bytes]) -> tuple[float, list[float], list[bytes]]:
    """Seconds of all, seconds of each, and what was answered."""
    seconds, answers, left = [0.0] * len(requests), [b""] * len(requests), iter(range(len(requests)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in left:
            began = time.perf_counter()
            writer.write(requests[number])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            answers[number] = await reader.readexactly(length)
            seconds[number] = time.perf_counter() - began
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return time.perf_counter() - began, seconds, answers


def main() -> None:
    chosen = options(__doc__, repetitions=7, requests=1000)
    with scratch() as folder, ExitStack() as servers:
        run = cluster.train("digits-cnn", overrides={"train.epochs": 2}, run=str(folder / "run")).run
        data = prepared(load_recipe("digits-cnn").data)
        pixels = table_rows(data.table("train"), data.manifest).columns["input"].values[: chosen.requests]
        requests, classes = requests_of(pixels), cluster.open_model(run).predict(pixels)
        manta = servers.enter_context(started("-m", "jobs", "serve", run, "--port", 0))
        ports = {way: free_port() for way in WAYS}
        for way, port in ports.items():
            servers.enter_context(started(BY_HAND / "fastapi_server.py", run, port, way))
            wait_until_it_answers(port)
        assert manta.stdout is not None
        ports["manta"] = int(manta.stdout.readline().strip().rstrip("/").rpartition(":")[2])
        latencies: dict[str, list[float]] = defaultdict(list)

        def rate(name: str) -> float:
            wall_s, seconds, answers = asyncio.run(asked(ports[name], requests))
            told = [json.loads(answer)["predictions"][0]["class"] for answer in answers]
            if told != classes:
                raise SystemExit(f"{name}: {sum(a != b for a, b in zip(told, classes, strict=True))} wrong answers")
            latencies[name] += seconds
            return len(requests) / wall_s

        cases = [
            Case(
                name,
                ">= 1.0",
                "requests/s",
                in_turn(chosen.repetitions, lambda: rate("manta"), lambda way=way: rate(way)),
            )
            for way, name in WAYS.items()
        ]
        figures = {
            name: {
                "p50": round(1e3 * statistics.median(values), 2),
                "p99": round(1e3 * float(np.quantile(values, 0.99)), 2),
            }
            for name, values in latencies.items()
        }
        publish("serving", cases, latency_ms=figures, clients=CLIENTS, requests=chosen.requests)


if __name__ == "__main__":
    main()
