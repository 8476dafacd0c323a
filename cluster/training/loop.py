"""The loop: `fit(recipe, context)` for every objective that is the mean of a loss over rows."""

import json
import logging
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cluster.data.loader import Batch
from cluster.recipe.recipe import Recipe
from cluster.training.checkpoints import Background, Checkpoints, State, described_rows, read_model, save_model, to_cpu
from cluster.training.context import Context
from cluster.training.evaluation import EVALUATION_ROWS, autocast, evaluate, evaluate_best
from cluster.training.journal import Journal, Pending
from cluster.training.memory import keep_freed_memory
from cluster.training.progress import Progress
from cluster.training.randomness import generator_state, seed_rank, set_generator_state

logger = logging.getLogger(__name__)


def fit(recipe: Recipe, *, context: Context) -> dict[str, Any]:
    """Train, from the newest checkpoint where there is one, and evaluate the best weights on the test split.

    Returns what result.json holds of it: metrics, best, steps, epochs, rows_per_s, …, the same on all ranks.
    Raises Diverged, naming the step, where the loss is NaN or infinite.
    """
    loop = Loop(recipe, context)
    try:
        for _ in loop.epochs():
            pass
        return loop.conclude()
    finally:
        loop.close()


class Loop:
    """Training that can be followed epoch by epoch; see `fit`. `close` must be called at the end."""

    def __init__(self, recipe: Recipe, context: Context) -> None:
        started = time.time()
        keep_freed_memory(context.device)
        self.whole_recipe = recipe
        self.recipe, self.context, self.train = recipe, context, recipe.train
        manifest = context.splits.manifest
        self.objective = recipe.supervised.build(manifest.num_outputs)
        self.names = ("loss", *self.objective.names)

        torch.manual_seed(self.train.seed)  # the same weights on all ranks
        self.model = recipe.model.build(manifest.signature)
        if self.train.compile:
            self.model.compile()
        self.wrapped = context.prepare(self.model)
        self.optimizer = recipe.optimizer.build(self.model.parameters())
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average: AveragedModel | None = None
        if self.train.ema_decay:
            average = get_ema_multi_avg_fn(self.train.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average)

        place = {"rank": context.rank, "world_size": context.world_size, "device": context.device}
        self.rows = context.splits.training(recipe, **place)  # type: ignore[arg-type]
        self.validation = context.splits.held("validation", context.device)
        self.num_steps = self.rows.order.num_steps * self.train.epochs
        self.buffers = [b for b in self.model.buffers() if b.is_floating_point()]

        self.journal = Journal(context.run, self.names, writes=context.rank == 0)
        interval = min(self.train.log_every_steps, self.rows.order.num_steps)
        self.pending = Pending(interval, len(self.objective.names), context.device)
        self.checkpoints = Checkpoints(context.run / "checkpoints", keep=self.train.keep_checkpoints)
        self.background = Background()
        seed_rank(self.train.seed, context.rank, 0)
        self._resume()
        self.journal.open(began=started)
        self._using: Recipe | None = None

    @property
    def progress(self) -> Progress:
        """Where training stands."""
        return self.journal.progress

    # -- the course of a run ---------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[dict[str, float]]:
        """All epochs that are left, each when it is asked for: its metrics, named as in result.json."""
        progress = self.progress
        progress.ended = progress.without_better(self.train.patience)
        while not self.ended:
            self._use(self.whole_recipe.at(progress.epoch))
            self._epoch()
            self._validate()
            self._keep_best()
            progress.next_epoch()
            progress.ended = progress.without_better(self.train.patience)
            if self.ended or progress.epoch % self.train.checkpoint_every_epochs == 0:
                self._checkpoint()
            else:
                self.journal.flush()
            yield self.journal.metrics()

    @property
    def ended(self) -> bool:
        """Whether no epoch is left."""
        return self.progress.ended is not None or self.progress.epoch >= self.train.epochs

    def _use(self, recipe: Recipe) -> None:
        """Go on with this recipe's values of the optimizer, its schedule and the objective."""
        if recipe is self._using:
            return
        self.recipe = self._using = recipe
        self.objective = recipe.supervised.build(self.context.splits.manifest.num_outputs)
        wanted = recipe.optimizer.build([nn.Parameter(torch.zeros(1, device=self.context.device))]).param_groups[0]
        for group in self.optimizer.param_groups:
            group.update({name: value for name, value in wanted.items() if name != "params"})
        self.base_rates = [wanted["lr"]] * len(self.optimizer.param_groups)

    def _epoch(self) -> None:
        self.model.train()
        steps = self.rows.order.num_steps
        began = time.perf_counter()
        for batch in self.rows.batches(self.progress.epoch, self.progress.epoch_step):
            self._step(batch)
            done = self.progress.epoch_step == steps
            due = self.train.checkpoint_every_steps
            save = bool(due) and self.progress.step % (due or 1) == 0 and not done
            if self.pending.full or done or save:
                began = self._log_interval(began)
            if save:
                self._refuse_broken_weights()
                self._checkpoint()
        self._refuse_broken_weights()
        self.journal.epoch_trained()

    def _step(self, batch: Batch) -> None:
        """One optimizer step: the gradient of the mean loss over the global batch."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * self.recipe.schedule.factor(self.progress.step, self.num_steps)
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over ranks: a rank's share of the sum counts world_size times
        scale = self.context.world_size / batch.global_rows if batch.num_rows else 0.0
        pieces = min(self.train.accumulation, max(batch.num_rows, 1))
        self.pending.begin(batch)
        for piece in range(pieces):
            if piece + 1 < pieces:
                with self.context.no_sync(self.wrapped):
                    self._backward(batch, piece, pieces, scale)
            else:
                self._backward(batch, piece, pieces, scale)
        if self.train.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_norm)
            self.pending.grad_norm = norm
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.journal.stepped()

    def _backward(self, batch: Batch, piece: int, pieces: int, scale: float) -> None:
        inputs, targets = batch.inputs, batch.targets
        if pieces > 1:
            inputs, targets = inputs.tensor_split(pieces)[piece], targets.tensor_split(pieces)[piece]
        with autocast(self.train.precision, self.context.device):
            measured = self.objective.measure(self.wrapped, inputs, targets)
        measured.loss.backward(torch.full_like(measured.loss, scale))
        if batch.num_rows:  # a row that only stands in for an empty slice counts nothing
            self.pending.add(measured.loss.detach(), self.objective.sums(measured, targets))

    def _validate(self) -> None:
        if self.validation is None:
            return
        self._average_buffers()
        metrics = evaluate(
            self._evaluated(),
            self.validation,
            self.objective,
            context=self.context,
            precision=self.train.precision,
            batch_size=EVALUATION_ROWS,
        )
        self.journal.validated(metrics)
        if not np.isfinite(metrics["loss"]):
            self._diverged("validation loss", self.progress.step)

    def conclude(self) -> dict[str, Any]:
        """Evaluate the best weights on the test split. Returns what `fit` returns."""
        self.background.wait()
        self.context.agree(0)  # rank 0 has written the best weights before any rank reads them
        tested = evaluate_best(self.model, self.objective, context=self.context, precision=self.train.precision)
        result = self.journal.result(
            tested=tested,
            checkpoints=self.checkpoints,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            world_size=self.context.world_size,
        )
        return result.facts()

    # -- figures ---------------------------------------------------------------------------------------------------

    def _log_interval(self, began: float) -> float:
        """Add up the steps since the last call over all ranks and write their means. Returns the time now."""
        progress, pending, journal = self.progress, self.pending, self.journal
        sums, digest, rows = pending.collect()
        sums = self.context.reduce_sums(sums)
        totals = sums.sum(0).tolist()
        if not np.isfinite(totals[0]):
            first = int((~torch.isfinite(sums[:, 0])).nonzero()[0])
            self._diverged("loss", progress.step - len(sums) + first + 1)
        halves = self.context.reduce_sums(torch.from_numpy(digest).to(self.context.device)).tolist()
        elapsed = time.perf_counter() - began
        journal.trained(rows=rows, seconds=elapsed, digest=halves)
        extra: dict[str, Any] = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        if pending.grad_norm is not None:
            extra["grad_norm"] = float(pending.grad_norm)
        journal.interval(totals, weight=rows, rows_per_s=rows / elapsed, **extra)
        return time.perf_counter()

    def _diverged(self, what: str, step: int) -> NoReturn:
        raise self.progress.diverged(what, step=step, rate=self.base_rates[0])

    def _refuse_broken_weights(self) -> None:
        """Never keep weights that are NaN: the loss was taken before the step that made them so, and looks well."""
        finite = [parameter.isfinite().all() for parameter in self.model.parameters()]
        if finite and not torch.stack(finite).all():
            self._diverged("weights", self.progress.step)

    # -- the best weights, checkpoints, resuming -------------------------------------------------------------------

    def _evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: the moving average where there is one."""
        return self.average.module if self.average else self.model

    def _keep_best(self) -> None:
        """Write the weights where they are the best so far."""
        better: Any = "more" if self.objective.mode == "max" else "less"
        if not self.journal.note_best(self.objective.best_metric.removeprefix("validation/"), better):
            return
        if not self.progress.validation:
            self._average_buffers()
        if self.context.rank == 0:
            assert self.progress.best is not None
            weights = to_cpu(self._evaluated().state_dict())
            best, manifest = dict(self.progress.best), self.context.splits.manifest
            self.background.submit(lambda: save_model(self.context.run, weights, best=best, manifest=manifest))

    def _average_buffers(self) -> None:
        """Give all ranks the mean of their running statistics (batch normalisation's); gradients never see these."""
        if self.context.world_size == 1 or not self.buffers:
            return
        flat = torch.cat([buffer.flatten().double() for buffer in self.buffers])
        mean = self.context.reduce_sums(flat) / self.context.world_size
        for buffer, values in zip(self.buffers, mean.split([b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
        if self.average:
            for own, averaged in zip(self.model.buffers(), self.average.module.buffers(), strict=True):
                averaged.copy_(own)

    def _checkpoint(self) -> None:
        """Save everything that decides how training goes on. The loop waits only for the copy, not for the writing."""
        self._average_buffers()
        generators = self.context.gather(generator_state(self.context.device))
        if self.context.rank == 0:
            state: State = {
                "recipe": self.whole_recipe.model_dump_json(),
                "world_size": self.context.world_size,
                "rows": described_rows(self.context.splits.manifest),
                "progress": self.journal.state(),
                "model": to_cpu(self.model.state_dict()),
                "optimizer": to_cpu(self.optimizer.state_dict()),
                "average": to_cpu(self.average.state_dict()) if self.average else None,
                "generators": [generator.cpu() for generator in generators],
            }
            step = self.progress.step
            self.background.submit(lambda: self.checkpoints.save(step, state))
        self.journal.flush()

    def _resume(self) -> None:
        # Rank 0 looks: ranks that list an object store on their own might see different files.
        newest = self.checkpoints.newest_step() if self.context.rank == 0 else None
        step = self.context.agree(-1 if newest is None else newest)
        if step < 0:
            return
        state = self.checkpoints.at(step)
        self.checkpoints.refuse_other(state, recipe=self.recipe, rows=described_rows(self.context.splits.manifest))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        self.journal.progress = Progress.restored(state["progress"])
        if state["world_size"] == self.context.world_size:
            set_generator_state(state["generators"][self.context.rank], self.context.device)
        else:
            seed_rank(self.train.seed, self.context.rank, self.progress.step)
        self._take_saved_best()

    def _take_saved_best(self) -> None:
        """Know of the weights in RUN/model what the checkpoint, which may be older, does not.

        With another number of workers, or on a GPU, the epochs that follow need not come to the same figures again; the
        weights would then stay, and `best` would speak of others. Where they do, nothing is different at the end.
        """
        context = self.context
        better: Any = "more" if self.objective.mode == "max" else "less"
        text = ""
        if context.rank == 0 and (context.run / "model").exists("model.safetensors"):
            text = json.dumps(read_model(context.run).best)
        if size := context.agree(len(text)):
            own = torch.tensor(list(text.encode()) or [0] * size, dtype=torch.uint8, device=context.device)
            self.progress.take_best(json.loads(bytes(context.gather(own)[0].tolist())), better)
        elif self.progress.best is not None:
            logger.warning("%s/model: the best weights are gone; the best from here on count", context.run)
            self.progress.best = None

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.background.close()
        finally:
            self.journal.close()
