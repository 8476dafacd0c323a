"""GAN training: steps a second of a pair of actors against the usual loop and against the same halves in one process.

Each side has a thread for each process. Beside it, what the exchange of a step costs (rows one way, their gradient the
other) between the actors' peers and through Ray's object store.
"""

import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from by_hand.gan import steps as plain_steps
from measuring import Case, fashion, in_turn, options, publish, scratch

from cluster.adversarial.players import LocalPlayers, Players
from cluster.data.rows import table_rows
from cluster.data.scaling import Scaling
from cluster.data.shards import DataSet
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.runtime import RaySession, ray_session
from cluster.training.splits import Splits, open_splits

SIZES = {"50 KB": 12_544, "0.8 MB": 200_704, "3 MB": 786_432, "12 MB": 3_145_728}  # float32 numbers


def gan_recipe(data: DataSet, *, width: int, mode: str) -> Recipe:
    return load_recipe(
        {
            "model": {"kind": "dcgan", "width": width},
            "data": {"kind": "shards", "path": str(data.folder)},
            "objective": {"kind": "adversarial"},
            "optimizer": {"kind": "adam", "lr": 2e-4, "betas": [0.5, 0.999]},
            "train": {"global_batch_size": 64, "epochs": 1000},
            "adversarial": {"mode": mode},
        }
    )


def of_players(players: Players, *, steps: int) -> Callable[[], float]:
    """Steps a second of the next segment."""
    done = 0

    def rate() -> float:
        nonlocal done
        began = perf_counter()
        players.play(done, steps, 1.0)
        done += steps
        return steps / (perf_counter() - began)

    return rate


def of_plain(loop: Iterator[None], *, steps: int) -> Callable[[], float]:
    def rate() -> float:
        began = perf_counter()
        for _ in islice(loop, steps):
            pass
        return steps / (perf_counter() - began)

    return rate


def exchange(ray: Any) -> dict[str, dict[str, float]]:
    """Milliseconds for a tensor there and another back, by its size."""

    class Peer:
        def join(self, store: str, rank: int) -> None:
            import os

            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.set_num_threads(1)
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
            self.rank = rank

        def swap(self, size: int, times: int) -> float:
            mine, other = torch.zeros(size), 1 - self.rank
            began = perf_counter()
            for _ in range(times):
                for sender in (0, 1):
                    if sender == self.rank:
                        torch.distributed.send(mine, dst=other)
                    else:
                        torch.distributed.recv(mine, src=other)
            return 1000 * (perf_counter() - began) / times

        def echo(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 0  # a new one, as a gradient is

    with tempfile.TemporaryDirectory() as folder:
        peers = [ray.remote(Peer).options(num_cpus=1).remote() for _ in range(2)]
        ray.get([peer.join.remote(str(Path(folder) / "store"), rank) for rank, peer in enumerate(peers)])
        costs = {}
        for name, size in SIZES.items():
            for times in (3, 50):  # the first to warm up
                peers_ms = ray.get([peer.swap.remote(size, times) for peer in peers])[0]
            tensor = torch.zeros(size)
            ray.get(peers[0].echo.remote(tensor))
            began = perf_counter()
            for _ in range(20):
                ray.get(peers[0].echo.remote(tensor))
            costs[name] = {"peers_ms": round(peers_ms, 2), "object_store_ms": round(50 * (perf_counter() - began), 2)}
        for peer in peers:
            ray.kill(peer)
    return costs


def main() -> None:
    chosen = options(__doc__, repetitions=5, steps=60, rows=12_800, width=32)
    torch.set_num_threads(1)
    with scratch() as folder, ray_session(address=None, cpus=4, verbose=False) as session:
        from cluster.adversarial.actor_players import ActorPlayers

        ray = session.ray
        data = fashion(folder / "data", rows=chosen.rows)
        splits: Splits = open_splits(data, window=None)
        stored = torch.from_numpy(table_rows(splits.tables["train"], data.manifest).columns["input"].values.copy())
        images = Scaling(data.manifest.columns, "symmetric", torch.device("cpu"))({"input": stored})["input"]
        exact, pipelined = (gan_recipe(data, width=chosen.width, mode=mode) for mode in ("exact", "pipelined"))
        local = of_players(LocalPlayers(exact, splits, device=torch.device("cpu")), steps=chosen.steps)
        signature = data.manifest.signature
        plain = of_plain(plain_steps(exact, signature, images), steps=chosen.steps)

        def with_actors(recipe: Recipe, measure: Callable[[Callable[[], float]], Any]) -> Any:
            here = RaySession(ray, embedded=True)
            actors = ActorPlayers(recipe, splits, pairs=1, bundle={"CPU": 1}, session=here)
            try:
                return measure(of_players(actors, steps=chosen.steps))
            finally:
                actors.close()

        def against(other: Callable[[], float]) -> Callable[[Callable[[], float]], Any]:
            return lambda rate: in_turn(chosen.repetitions, rate, other)

        cases = [
            Case("exact, plain loop", ">= 0.9", "steps/s", with_actors(exact, against(plain))),
            Case("exact, one process", ">= 0.9", "steps/s", with_actors(exact, against(local))),
            Case(
                "pipelined, exact",
                ">= 1.0",
                "steps/s",
                with_actors(pipelined, lambda ahead: with_actors(exact, against_exact(ahead, chosen.repetitions))),
            ),
            Case("one process, plain loop", ">= 0.9", "steps/s", in_turn(chosen.repetitions, local, plain)),
        ]
        costs = exchange(ray)
    publish("adversarial", cases, threads=1, batch=64, width=chosen.width, steps=chosen.steps, exchange=costs)


def against_exact(ahead: Callable[[], float], repetitions: int) -> Callable[[Callable[[], float]], Any]:
    """Pairs of (pipelined, exact): both pairs of actors are there, and play in turn."""
    return lambda exact: in_turn(repetitions, ahead, exact)


if __name__ == "__main__":
    main()
