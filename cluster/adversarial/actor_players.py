"""Actor players: the halves in Ray actors of their own, started and led from one process."""

import logging
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from cluster.adversarial.actors import DiscriminatorActor, GeneratorActor, Seat
from cluster.adversarial.halves import Weights
from cluster.adversarial.players import Played, PlayersLost, State, as_halves
from cluster.errors import RayLost, RunFailed, StorageFailed
from cluster.group import lost_peer
from cluster.recipe.recipe import Recipe
from cluster.runtime import RaySession
from cluster.runtime.draining import DRIVER, draining, drains
from cluster.runtime.lifeline import POLL_S
from cluster.training.splits import Splits
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5  # for the other halves to say what they know, once one has failed
PLACEMENT_NOTICE_S = 30


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
            kind: type[GeneratorActor | DiscriminatorActor] = GeneratorActor if index < pairs else DiscriminatorActor
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
