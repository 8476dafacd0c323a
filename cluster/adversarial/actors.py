"""Actors: the halves as coordinated Ray actors, which exchange tensors directly as peers of a process group.

R pairs are 2R peers: generator r is peer r, discriminator r is peer R + r. A pair plays its slice of every global
batch; the replicas of a half add up their gradients. The coordinator calls them once a segment, never once a step.
"""

import logging
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor, distributed

from cluster.adversarial.halves import DiscriminatorHalf, GeneratorHalf, Weights, sample
from cluster.adversarial.players import (
    Played,
    PlayersLost,
    Segment,
    State,
    as_halves,
    learn,
    take_turn,
)
from cluster.errors import RayLost, RunFailed, StorageFailed
from cluster.group import join, listen_at, lost_peer
from cluster.recipe.recipe import Recipe
from cluster.runtime import RaySession
from cluster.runtime.draining import DRIVER, draining, drains
from cluster.runtime.lifeline import POLL_S
from cluster.training.checkpoints import to_cpu
from cluster.training.leaving import once_on_sigterm
from cluster.training.memory import keep_freed_memory
from cluster.training.splits import Splits
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

EXCHANGE_TIMEOUT_S = 1800  # a peer may take so long for its side of a step
MEETING_TIMEOUT_S = 50
LAST_WORDS_S = 5  # for the other halves to say what they know, once one has failed
PLACEMENT_NOTICE_S = 30


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


class ActorPlayers:
    """Both halves in actors of their own, R replicas of each, in one placement group; see Players.

    Where one dies all are ended: what the others hold is of no use without it.
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        *,
        pairs: int,
        bundle: dict[str, float],
        session: RaySession,
    ) -> None:
        """Start an embedded Ray anew first, where it has gone. Raises PlayersLost where a half dies while it starts.

        Raises RayLost where this process's own node is about to go.
        """
        session.revive()
        if session.drained():
            raise RayLost(DRIVER)
        self._session = session
        self._notes: Path | None = None
        self._actors: list[Any] = []
        self._group: PlacementGroup | None = None
        try:
            self._start(recipe, splits, pairs, bundle)
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        recipe: Recipe,
        splits: Splits,
        pairs: int,
        bundle: dict[str, float],
    ) -> None:
        session = self._session
        tables = session.references(splits.tables)
        first = 1 if session.placed else 0  # a trial's first bundle is its own
        group = get_current_placement_group() if session.placed else None
        if group is None:
            group = self._group = placement_group([bundle] * (2 * pairs), strategy="PACK")
            self._await_room(group, f"{2 * pairs} actors of {bundle} each")
        common = (recipe.model_dump(mode="json"), replace(splits, tables={}), tables)
        cpus = int(bundle["CPU"])
        for index in range(2 * pairs):
            kind: type[_Actor] = GeneratorActor if index < pairs else DiscriminatorActor
            options = {
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0),
                "max_restarts": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=first + index
                ),
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cpus)}},
            }
            seat = Seat(index % pairs, pairs, cpus)
            self._actors.append(ray.remote(kind).options(**options).remote(*common, seat, sys.path))
        self._generators, self._discriminators = self._actors[:pairs], self._actors[pairs:]
        if session.embedded:  # a file is where they meet: nothing listens but on loopback
            self._notes = Path(tempfile.mkdtemp(prefix="manta-", dir=session.folder))
            meeting = f"file://{self._notes / uuid.uuid4().hex}"
        else:
            meeting = self._all([self._actors[0].meeting_point.remote()])[0]
        self._nodes = set(self._all([actor.join.remote(meeting) for actor in self._actors]))

    def _await_room(self, group: PlacementGroup, what: str) -> None:
        notice = time.monotonic() + PLACEMENT_NOTICE_S
        while not group.wait(POLL_S):
            self._refuse_lost()
            if time.monotonic() >= notice:
                logger.warning("waiting for room for %s", what)
                notice += PLACEMENT_NOTICE_S

    def play(self, first_step: int, num_steps: int, rate: float) -> Played:
        """See Players."""
        parts = self._all([actor.play.remote(first_step, num_steps, rate) for actor in self._actors])
        return Played(np.sum([part.sums for part in parts], axis=0), np.sum([part.digest for part in parts], axis=0))

    def sample(self, source: Tensor, condition: Tensor | None, *, weights: Weights) -> Tensor:
        """See Players."""
        made: Tensor = self._all([self._generators[0].sample.remote(source, condition, weights)])[0]
        return made

    def state(self) -> State:
        """See Players."""
        first = (self._generators[0], self._discriminators[0])
        generator, discriminator = self._all([actor.state.remote() for actor in first])
        return {"generator": generator, "discriminator": discriminator}

    def load(self, state: State) -> None:
        """See Players."""
        halves = ((self._generators, state["generator"]), (self._discriminators, state["discriminator"]))
        references = [(actors, ray.put(half)) for actors, half in halves]
        self._all([actor.load.remote(half) for actors, half in references for actor in actors])

    def kept(self, weights: Weights) -> dict[str, Tensor]:
        """See Players."""
        calls = [self._generators[0].weights.remote(weights), self._discriminators[0].weights.remote()]
        return as_halves(*self._all(calls))

    def warned(self) -> str | None:
        """See Players."""
        if self._session.drained():
            return DRIVER
        if not self._session.embedded and (nodes := draining(self._nodes)):
            return drains(nodes)
        return next(filter(None, self._all([actor.warned.remote() for actor in self._actors])), None)

    def close(self) -> None:
        """See Players."""
        actors, group = self._actors, self._group
        self._actors, self._group = [], None
        if self._session.lost() is None:  # else they have gone with it, and nobody answers
            for actor in actors:
                ray.kill(actor)
            if group is not None:
                remove_placement_group(group)
        if self._notes is not None:
            shutil.rmtree(self._notes, ignore_errors=True)

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        """What the calls return. Raises what went wrong in them as soon as one fails, after all actors are ended."""
        left = list(calls)
        while left:
            self._refuse_lost()
            done, left = ray.wait(left, timeout=POLL_S, fetch_local=False)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                errors = [error, *self._errors(left)]
                self.close()
                raise _worst(errors) from None
        return list(ray.get(list(calls)))

    def _refuse_lost(self) -> None:
        if reason := self._session.lost():
            self.close()
            raise PlayersLost(reason)

    @staticmethod
    def _errors(calls: Sequence[Any]) -> list[Exception]:
        """How other calls failed, of those that fail within a moment."""
        found: list[Exception] = []
        left, until = list(calls), time.monotonic() + LAST_WORDS_S
        while left and time.monotonic() < until:
            done, left = ray.wait(left, timeout=max(0.0, until - time.monotonic()))
            for call in done:
                try:
                    ray.get(call)
                except ray.exceptions.RayError as error:
                    found.append(error)
        return found


def _worst(errors: Sequence[Exception]) -> Exception:
    """What to raise: what the user must mend, else that a process died, else what only would happen again."""
    causes = [getattr(error, "cause", None) or error for error in errors]
    for cause in causes:
        if isinstance(cause, UserError):
            return UserError.of(cause.problems)
        if isinstance(cause, StorageFailed):
            return StorageFailed(*cause.args)
    dead = [
        error
        for error in errors
        if isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError))
    ]
    if dead:
        return PlayersLost("the process of a half has died")
    for error, cause in zip(errors, causes, strict=True):
        if not lost_peer(cause):
            return RunFailed(str(error))
    return PlayersLost("a half has lost its peer")
