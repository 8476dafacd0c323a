"""Actors: the halves as coordinated Ray actors, which exchange tensors directly as peers of a process group.

R pairs are 2R peers: generator r is peer r, discriminator r is peer R + r. A pair plays its slice of every global
batch; the replicas of a half add up their gradients. The coordinator calls them once a segment, never once a step.
"""

import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, distributed

from cluster.adversarial.halves import DiscriminatorHalf, GeneratorHalf, Weights, sample
from cluster.adversarial.players import (
    Played,
    Segment,
    State,
    learn,
    take_turn,
)
from cluster.group import join, listen_at
from cluster.recipe.recipe import Recipe
from cluster.training.checkpoints import to_cpu
from cluster.training.leaving import once_on_sigterm
from cluster.training.memory import keep_freed_memory
from cluster.training.splits import Splits

EXCHANGE_TIMEOUT_S = 1800  # a peer may take so long for its side of a step
MEETING_TIMEOUT_S = 50


@dataclass(frozen=True)
class Seat:
    """An actor's place among its peers."""

    replica: int
    replicas: int
    threads: int


class _Actor:
    """What both halves' actors have in common."""

    half: GeneratorHalf | DiscriminatorHalf

    def __init__(
        self, recipe: dict[str, Any], splits: Splits, tables: dict[str, Any], seat: Seat, path: Sequence[str]
    ) -> None:
        sys.path.extend(part for part in path if part not in sys.path)
        self._sigterm = threading.Event()
        once_on_sigterm(self._sigterm.set)
        torch.set_num_threads(seat.threads)
        self.seat = seat
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        keep_freed_memory(self.device)
        self.recipe = Recipe.model_validate(recipe)
        held = dict(zip(tables, ray.get(list(tables.values())), strict=True))
        self.splits = replace(splits, tables=held)
        place = {"rank": seat.replica, "world_size": seat.replicas, "device": self.device}
        self.rows = self.splits.training(self.recipe, **place)  # type: ignore[arg-type]
        self.group: Any = None  # this half's replicas
        self._sent: tuple[Any, Tensor] | None = None  # held until it has been taken

    def meeting_point(self) -> str:
        """An address on this actor's node where the peers can meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, meeting: str) -> str:
        """Become one of the peers that meet there. Returns the id of this actor's node."""
        listen_at(ray.util.get_node_ip_address())
        replicas = self.seat.replicas
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        join(meeting, self.peer, world_size=2 * replicas, backend=backend, timeout_s=MEETING_TIMEOUT_S)
        patience = timedelta(seconds=EXCHANGE_TIMEOUT_S)
        halves = [distributed.new_group(range(first, first + replicas), timeout=patience) for first in (0, replicas)]
        self.group = halves[self.peer // replicas]
        self.exchange: Any = distributed.new_group(range(2 * replicas), timeout=patience)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def warned(self) -> str | None:
        """Whether its process has been told to end, in words."""
        who = f"half {self.peer} on {ray.util.get_node_ip_address()}"
        return f"{who} was told to end (SIGTERM)" if self._sigterm.is_set() else None

    @property
    def peer(self) -> int:
        """This actor's rank among all peers."""
        raise NotImplementedError

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum over the replicas of this half, in place: one exchange for all."""
        if self.seat.replicas == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat, group=self.group)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def send(self, tensor: Tensor, peer: int) -> None:
        """Send without waiting for the peer to take it; only one tensor is on its way at once.

        In the pipelined mode both halves send before they receive: each waiting for the other would be for ever.
        """
        self.arrive()
        self._sent = (distributed.isend(tensor, dst=peer, group=self.exchange), tensor)

    def arrive(self) -> None:
        """Return once what was sent has been taken."""
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None

    def segment(self, first_step: int, num_steps: int, rate: float) -> Segment:
        """The turns of this pair."""
        return Segment(
            self.recipe, self.rows, first_step=first_step, num_steps=num_steps, rate=rate, device=self.device
        )

    def state(self) -> State:
        """All that decides how it goes on."""
        state: State = to_cpu(self.half.state())
        return state

    def load(self, state: State) -> None:
        """Go on from there."""
        self.half.load(state)


class GeneratorActor(_Actor):
    """A replica of the generator."""

    half: GeneratorHalf

    def __init__(self, *world: Any) -> None:
        super().__init__(*world)
        self.half = GeneratorHalf(self.recipe, self.splits.manifest.signature, device=self.device, reduce=self.reduce)

    @property
    def peer(self) -> int:
        """See _Actor."""
        return self.seat.replica

    def play(self, first_step: int, num_steps: int, rate: float) -> Played:
        """Its side of a segment."""
        segment = self.segment(first_step, num_steps, rate)
        opponent = self.peer + self.seat.replicas
        waiting: Tensor | None = None  # the last rows made, where it has not learned from them

        def learn_from(fake: Tensor) -> None:
            gradient = torch.empty_like(fake)
            distributed.recv(gradient, src=opponent, group=self.exchange)
            learn(self.half, segment, gradient)

        for turn in segment:
            fake = self.half.make(turn).contiguous()
            self.send(fake, opponent)
            if waiting is not None:
                learn_from(waiting)
            waiting = fake if turn.generator_learns else None
            if waiting is not None and not self.half.runs_ahead:
                learn_from(waiting)
                waiting = None
        if waiting is not None:  # a segment ends with both halves at the same step
            learn_from(waiting)
        self.arrive()
        self.half.average_buffers(self.seat.replicas)
        played = segment.played()
        return Played(played.sums, np.zeros_like(played.digest))  # the discriminator saw the same rows

    def sample(self, source: Tensor, condition: Tensor | None, weights: Weights) -> Tensor:
        """See Players."""
        return sample(self.half.weights(weights), source, condition, device=self.device)

    def weights(self, weights: Weights) -> State:
        """Its weights, or their moving average."""
        state: State = to_cpu(self.half.weights(weights).state_dict())
        return state


class DiscriminatorActor(_Actor):
    """A replica of the discriminator."""

    half: DiscriminatorHalf

    def __init__(self, *world: Any) -> None:
        super().__init__(*world)
        self.half = DiscriminatorHalf(
            self.recipe, self.splits.manifest.signature, device=self.device, reduce=self.reduce
        )

    @property
    def peer(self) -> int:
        """See _Actor."""
        return self.seat.replicas + self.seat.replica

    def play(self, first_step: int, num_steps: int, rate: float) -> Played:
        """Its side of a segment."""
        segment = self.segment(first_step, num_steps, rate)
        opponent = self.seat.replica
        for turn in segment:
            made = torch.empty_like(turn.real)
            coming = distributed.irecv(made, src=opponent, group=self.exchange)

            def fake(made: Tensor = made, coming: Any = coming) -> Tensor:
                coming.wait()  # while the gradient of the real rows was computed, the rows came
                return made

            gradient = take_turn(self.half, segment, turn, fake)
            if gradient is not None:
                self.send(gradient.contiguous(), opponent)
        self.arrive()
        self.half.average_buffers(self.seat.replicas)
        return segment.played()

    def weights(self) -> State:
        """Its weights."""
        state: State = to_cpu(self.half.module.state_dict())
        return state
