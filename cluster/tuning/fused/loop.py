"""Fused trials: several recipes that differ only in values which can be batched, trained as one batched model.

Each trial keeps what it would have alone: its weights, order of rows and learning rate, its metrics, best weights and
checkpoints in its own run directory, in the ordinary loop's formats. With the same seeds its figures are those of
`cluster.training.loop.fit`, but for the rounding of sums in another order. Dropout draws for all trials from one
stream, so a trial's masks are others than alone: as good, and not the same.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np
import torch

from cluster.data.keys import RowIds, digest_part
from cluster.errors import Diverged
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Background, State, name_at, save_model, to_cpu
from cluster.training.context import LocalContext
from cluster.training.evaluation import evaluate_best, names_of
from cluster.training.identity import data_facts, described_rows
from cluster.training.memory import keep_freed_memory
from cluster.training.progress import Progress
from cluster.training.randomness import generator_state, seed_rank, set_generator_state
from cluster.training.splits import EVALUATION_ROWS, Splits
from cluster.tuning.fused.groups import groups, why_not
from cluster.tuning.fused.member import Member, Weights
from cluster.tuning.fused.model import FusedModel, num_parameters
from cluster.tuning.fused.optimizers import FusedOptimizers, clip_gradients, gradient_norms
from cluster.tuning.fused.rows import FusedBatch, FusedRows
from nn_models.batch import Place
from nn_models.errors import UserError
from nn_models.objectives import Objective

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    """Losses and metric sums of the steps since the last line of metrics: (steps, trials, 1 + metrics)."""

    sums: torch.Tensor
    used: list[tuple[Place, Mapping[int, RowIds]]] = field(default_factory=list)  # of each step's batch: see FusedBatch
    norms: torch.Tensor | None = None  # of the last step's gradients, (trials,)


class FusedLoop:
    """Trains the recipes of one group (see `fused.groups`) epoch by epoch. `close` must be called at the end.

    Each recipe has a run directory that has been begun; where they hold checkpoints, training goes on from the newest
    step that all have. A trial whose loss or weights become NaN or infinite leaves the batch and is in `failures`.
    """

    def __init__(
        self, recipes: Sequence[Recipe], *, splits: Splits, runs: Sequence[Folder], device: torch.device
    ) -> None:
        """Raises UserError where the recipes cannot be fused."""
        _refuse(recipes, splits)
        started = time.time()
        keep_freed_memory(device)
        self._train, self._schedule = recipes[0].train, recipes[0].schedule
        self._splits, self._device = splits, device

        self._model = FusedModel(recipes, splits.manifest.signature, device=device)
        self._objective = self._model.objective
        self._names = names_of(self._objective)
        self._optimizers = FusedOptimizers([recipe.optimizer for recipe in recipes], self._model.parameters)
        self._rows = FusedRows(recipes[0], [recipe.train.seed for recipe in recipes], splits, device)
        # all trials' activations are in memory together, but training holds as much
        size = max(self._train.global_batch_size // self._train.accumulation, EVALUATION_ROWS // len(recipes), 1)
        self._validation = splits.evaluation(
            "validation", recipes[0], rank=0, world_size=1, device=device, batch_size=size
        )
        self._num_steps = self._rows.order.num_steps * self._train.epochs

        interval = min(self._train.log_every_steps, self._rows.order.num_steps)
        sums = torch.zeros(interval, len(recipes), len(self._names), dtype=torch.float64, device=device)
        self._pending = _Pending(sums)
        self._background = Background()
        self.results: dict[int, dict[str, Any]] = {}  # of the trials that are concluded, as `fit` returns them
        self.failures: dict[int, Diverged] = {}

        self._kinds: tuple[Weights, ...] = ("averaged", "plain") if self._model.average else ("plain",)
        self._live = [
            Member.of(number, recipe, run, names=self._names, chosen=self._kinds[0])
            for number, (recipe, run) in enumerate(zip(recipes, runs, strict=True))
        ]
        seed_rank(self._train.seed, 0, 0)
        self._resume()
        for member in self._live:
            member.journal.open(began=started)
        self._conclude_impatient()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the course of a group -------------------------------------------------------------------------------------

    @property
    def live(self) -> tuple[int, ...]:
        """The trials in the batch, by their places among the recipes."""
        return tuple(member.number for member in self._live)

    @property
    def epochs_done(self) -> int:
        """Epochs that the trials in the batch have behind them."""
        return self._live[0].progress.epoch if self._live else 0

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return not self._live or self._live[0].progress.epoch >= self._train.epochs

    def epoch(self) -> dict[int, dict[str, float]]:
        """Train and validate one epoch. Returns each trial's metrics, named as in result.json, by its place.

        Checkpoints are saved as the recipe says. A trial that runs out of patience is then concluded, and no longer
        live; one that diverges is left out.
        """
        if self.ended:
            return {}
        self._train_epoch()
        self._validate()
        found = {}
        for place, member in enumerate(self._live):
            progress = member.progress
            if member.note_best(self._objective):
                member.best_weights = self._model.weights(place, averaged=member.chosen == "averaged")
            progress.next_epoch()
            progress.ended = progress.without_better(self._train.patience)  # before a checkpoint is saved
            found[member.number] = member.journal.metrics()
        if self._live:
            if self.ended or self._live[0].progress.epoch % self._train.checkpoint_every_epochs == 0:
                self.save()
            self._conclude_impatient()
        return found

    def stop(self, number: int) -> dict[str, Any]:
        """Take a trial out of the batch and conclude it. Returns what `fit` returns; the others go on as they were."""
        place = self.live.index(number)
        member = self._live[place]
        names = member.checkpoints.names()
        if not names or names[-1] != name_at(member.progress.step):
            self._save([place])
        self._background.wait()
        self.results[number] = self._concluded(member)
        self._drop([member])
        return self.results[number]

    def conclude(self) -> dict[int, dict[str, Any]]:
        """Conclude all trials that are left. Returns what `fit` returns for each that has not failed, by its place."""
        for number in self.live:
            self.stop(number)
        return self.results

    def save(self) -> None:
        """Save a checkpoint of every trial in the batch, and its best weights; they are written in the background."""
        self._save(range(len(self._live)))

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self._background.close()
        finally:
            for member in self._live:
                member.journal.close()

    def _conclude_impatient(self) -> None:
        for member in list(self._live):
            member.progress.ended = member.progress.without_better(self._train.patience)
            if member.progress.ended:
                self.stop(member.number)

    def _concluded(self, member: Member) -> dict[str, Any]:
        """Evaluate a trial's best weights on the test split."""
        tested = None
        if member.progress.best:
            context = LocalContext(run=member.run, splits=self._splits, device=self._device)
            objective = cast(Objective, member.recipe.objective.build(self._splits.manifest.signature))
            tested = evaluate_best(self._model.plain, objective, recipe=member.recipe, context=context)
        left = "left the group before its last epoch" if member.progress.epoch < self._train.epochs else None
        result = member.journal.result(
            tested=tested,
            checkpoints=member.checkpoints,
            num_parameters=num_parameters(self._model.plain),
            ended=member.progress.ended or left,
        )
        return result.facts()

    # -- an epoch --------------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        steps = self._rows.order.num_steps
        first = self._live[0].progress
        began = time.perf_counter()
        for batch in self._rows.batches(first.epoch, first.epoch_step, self._seeds):
            self._step(batch)
            progress = self._live[0].progress
            done = progress.epoch_step == steps
            due = self._train.checkpoint_every_steps
            save = bool(due) and progress.step % (due or 1) == 0 and not done
            if len(self._pending.used) == len(self._pending.sums) or done or save:
                began = self._log_interval(began)
            if save:
                self._drop_broken_weights()
                self.save()
            if not self._live:
                return
        self._drop_broken_weights()
        for member in self._live:
            member.journal.epoch_trained()

    def _seeds(self) -> list[int]:
        return [member.recipe.train.seed for member in self._live]

    def _step(self, batch: FusedBatch) -> None:
        """One optimizer step of every trial: the gradient of the mean loss over its batch."""
        model, pending = self._model, self._pending
        number = len(pending.used)
        pending.used.append((batch.place, batch.ids))
        self._optimizers.zero_grad()
        for piece in batch.pieces(self._train.accumulation):
            losses, metrics = model.measure(piece, shared=batch.shared)
            losses.backward(torch.full_like(losses, 1 / batch.place.num_rows))
            pending.sums[number, : model.size, 0] += losses.detach()
            pending.sums[number, : model.size, 1:] += metrics
        if self._train.clip_norm:
            pending.norms = clip_gradients(model.parameters, self._train.clip_norm)
        elif self._train.record_grad_norm:
            pending.norms = gradient_norms(model.parameters)
        self._optimizers.step(self._schedule.factor(self._live[0].progress.step, self._num_steps))
        model.update_average()
        for member in self._live:
            member.journal.stepped()

    def _log_interval(self, began: float) -> float:
        """Write the means of the steps since the last call. Returns the time now."""
        pending, self._pending = self._pending, _Pending(self._pending.sums)
        sums = pending.sums[: len(pending.used), : len(self._live)].clone()
        pending.sums.zero_()
        totals = sums.sum(0).tolist()
        digests = {
            seed: np.sum([digest_part(ids[seed], place.start) for place, ids in pending.used], axis=0).tolist()
            for seed in pending.used[-1][1]
        }
        rows = sum(place.num_rows for place, _ in pending.used)
        rates = self._optimizers.rates()
        norms = None if pending.norms is None else pending.norms.tolist()
        elapsed = time.perf_counter() - began
        failed = []
        for place, member in enumerate(self._live):
            progress, total = member.progress, totals[place]
            if not np.isfinite(total[0]):
                first = int((~torch.isfinite(sums[:, place, 0])).nonzero()[0])
                failed.append(self._diverged(member, "loss", progress.step - len(sums) + first + 1))
                continue
            member.journal.trained(rows=rows, seconds=elapsed, digest=digests[member.recipe.train.seed])
            extra = {"learning_rate": rates[place], **({"grad_norm": norms[place]} if norms else {})}
            member.journal.interval(total, weight=rows, rows_per_s=rows / elapsed, **extra)
        self._drop(failed)
        return time.perf_counter()

    def _validate(self) -> None:
        """Metrics of the validation split, over all trials at once; of averaged and plain weights the better ones."""
        rows = self._validation
        if rows is None or not self._live:
            return
        shape = (len(self._live), len(self._names))
        total = {kind: torch.zeros(shape, dtype=torch.float64, device=self._device) for kind in self._kinds}
        for (batch,) in rows.batches(0):
            for kind, sums in total.items():
                losses, metrics = self._model.evaluate(batch, averaged=kind == "averaged")
                sums[:, 0] += losses
                sums[:, 1:] += metrics
        means = {kind: (sums / rows.order.num_rows).tolist() for kind, sums in total.items()}
        failed = []
        for place, member in enumerate(self._live):
            found = {kind: dict(zip(self._names, means[kind][place], strict=True)) for kind in self._kinds}
            if not member.validated(found, self._objective):
                failed.append(self._diverged(member, "validation loss", member.progress.step))
        self._drop(failed)

    # -- leaving the batch -----------------------------------------------------------------------------------------

    def _diverged(self, member: Member, what: str, step: int) -> Member:
        self.failures[member.number] = member.progress.diverged(what, step=step, rate=member.recipe.optimizer.lr)
        return member

    def _drop_broken_weights(self) -> None:
        """Never keep weights that are NaN: the loss was taken before the step that made them so, and looks well."""
        if not self._live:
            return
        finite = self._model.finite().tolist()
        broken = [member for member, whole in zip(self._live, finite, strict=True) if not whole]
        self._drop([self._diverged(member, "weights", member.progress.step) for member in broken])

    def _drop(self, members: Sequence[Member]) -> None:
        """Take these out of the batch."""
        if not members:
            return
        for member in members:
            member.journal.close()
        numbers = [member.number for member in members]
        places = [place for place, member in enumerate(self._live) if member.number not in numbers]
        self._live = [self._live[place] for place in places]
        if places:
            self._model.keep(places)
            self._optimizers = self._optimizers.kept(places, self._model.parameters)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self, places: Sequence[int]) -> None:
        """Copy everything that decides how these trials go on, and have it written."""
        generator, manifest = generator_state(self._device).cpu(), self._splits.manifest
        jobs = []
        for place in places:
            member = self._live[place]
            state: State = {
                "recipe": member.recipe.model_dump_json(),
                "world_size": 1,
                "rows": described_rows(manifest),
                "data": data_facts(manifest),
                "progress": member.journal.state(),
                "model": self._model.weights(place),
                "optimizer": to_cpu(self._optimizers.state_dict(place)),
                "average": self._model.averages(place),
                "generators": [generator],
                "carry": None,
            }
            best, member.best_weights = member.best_weights, None
            jobs.append((member, state, best))

        def write() -> None:
            for member, state, best in jobs:
                if best is not None:  # first: a checkpoint that knows of it may be the last thing that is written
                    save_model(member.run, best, best=state["progress"]["best"], manifest=manifest)
                member.checkpoints.save_as(name_at(state["progress"]["step"]), state)
            for member, _, _ in jobs:  # not before all are there: they must go on from a step that all have
                member.checkpoints.drop_oldest()

        self._background.submit(write)
        for member, _, _ in jobs:
            member.journal.flush()

    def _resume(self) -> None:
        """Go on from the newest step of which all trials have a checkpoint."""
        names = [member.checkpoints.names() for member in self._live]
        common = sorted(set.intersection(*map(set, names)))
        if any(names) and not common:
            logger.warning("fused trials have no checkpoints of the same step: they begin anew")
        for member, own in zip(self._live, names, strict=True):
            for newer in own[own.index(common[-1]) + 1 :] if common else own:
                member.checkpoints.folder.delete(newer)  # else it would count as newer than those to come
        if not common:
            return
        for place, member in enumerate(self._live):
            state = member.checkpoints.read(common[-1])
            with member.checkpoints.restoring(common[-1]):
                self._take_up(place, member, state)

    def _take_up(self, place: int, member: Member, state: State) -> None:
        """Have one trial go on from its checkpoint's state."""
        member.checkpoints.refuse_other(state, recipe=member.recipe, manifest=self._splits.manifest)
        self._model.load(place, state["model"], state["average"])
        self._optimizers.load_state_dict(place, state["optimizer"])
        member.journal.progress = Progress.restored(state["progress"])
        member.journal.progress.refuse_other_metrics(len(member.journal.names))
        if place == 0:  # all have saved the same
            set_generator_state(state["generators"][0], self._device)


def _refuse(recipes: Sequence[Recipe], splits: Splits) -> None:
    if reason := why_not(recipes[0], splits.manifest):
        raise UserError(reason.path, reason.message, "train such trials one by one")
    if len(groups(recipes, manifest=splits.manifest)) != 1:
        raise UserError(
            "", "trials that differ in more than values which can be batched cannot be fused", "group them first"
        )
