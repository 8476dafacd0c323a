"""The loop: `fit(recipe, context)` for every objective that trains one net."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from cluster.recipe.recipe import Recipe
from cluster.training.average import MovingAverage
from cluster.training.beginning import new_model
from cluster.training.buffers import fill, flat
from cluster.training.carry import gathered, of_rows, on_device
from cluster.training.checkpoints import Background, Checkpoints, State, name_at, read_model, save_model, to_cpu
from cluster.training.context import Context
from cluster.training.evaluation import evaluate, evaluate_best, names_of
from cluster.training.gradients import touch_only_used_rows
from cluster.training.identity import data_facts, described_rows
from cluster.training.journal import Collected, Journal, Pending
from cluster.training.leaving import Left
from cluster.training.memory import keep_freed_memory
from cluster.training.progress import Progress
from cluster.training.randomness import generator_state, seed_rank, set_generator_state
from cluster.training.step import Step
from nn_models.objectives import Objective

logger = logging.getLogger(__name__)


def fit(recipe: Recipe, *, context: Context, since: float | None = None) -> dict[str, Any]:
    """Train, from the newest checkpoint where there is one, and evaluate the best weights on the test split.

    Returns what result.json holds of it: metrics, best, steps, epochs, rows_per_s, …, the same on all ranks.
    Where these are not the first workers of a run, `since` is when it began: see Journal.open.
    Raises Diverged, naming the step, where the loss is NaN or infinite; Left where the context says so.
    """
    loop = Loop(recipe, context, since=since)
    try:
        for _ in loop.epochs():
            pass
        return loop.conclude()
    finally:
        loop.close()


class Loop:
    """Training that can be followed epoch by epoch; see `fit`. `close` must be called at the end."""

    def __init__(self, recipe: Recipe, context: Context, *, since: float | None = None) -> None:
        started = time.time()
        keep_freed_memory(context.device)
        self.whole_recipe = recipe
        self.recipe, self.context, self.train = recipe, context, recipe.train
        self.manifest = context.splits.manifest
        self.objective = cast(Objective, recipe.objective.build(self.manifest.signature))

        self.checkpoints = Checkpoints(context.run / "checkpoints", keep=self.train.keep_checkpoints)
        # Rank 0 looks: ranks that list an object store on their own might see different files.
        newest = context.share(self.checkpoints.newest_step() if context.rank == 0 else None)
        self.model = new_model(recipe, self.manifest.signature, begins=newest is None)
        touch_only_used_rows(self.model, recipe, device=context.device)
        if self.train.compile:
            self.model.compile()
        wrapped = context.prepare(self.model)
        self.optimizer = recipe.optimizer.build(self.model.parameters())
        self.average = MovingAverage(self.model, self.train.ema_decay) if self.train.ema_decay else None
        self.chosen: nn.Module = self.average.module if self.average else self.model  # what is evaluated and kept

        place = {"rank": context.rank, "world_size": context.world_size}
        self.rows = context.splits.training(recipe, device=context.device, **place)
        self.validation = context.splits.evaluation("validation", recipe, device=context.device, **place)
        self.num_steps = self.rows.order.num_steps * self.train.epochs

        names = names_of(self.objective)
        self.journal = Journal(context.run, names, writes=context.rank == 0)
        interval = min(self.train.log_every_steps, self.rows.order.num_steps)
        self.pending = Pending(interval, len(names) - 1, context.device)
        self.step = Step(
            self.model,
            self.optimizer,
            wrapped=wrapped,
            train=self.train,
            context=context,
            average=self.average,
            pending=self.pending,
            carries=self.rows.order.carries,
        )
        self.background = Background()
        seed_rank(self.train.seed, context.rank, 0)
        if newest is not None:
            self._resume(newest)
        self.journal.open(began=started, since=since)
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
        self.objective = cast(Objective, recipe.objective.build(self.manifest.signature))
        wanted = recipe.optimizer.build([nn.Parameter(torch.zeros(1, device=self.context.device))]).param_groups[0]
        self.step.use({name: value for name, value in wanted.items() if name != "params"})

    def _epoch(self) -> None:
        self.model.train()
        steps = self.rows.order.num_steps
        began = time.perf_counter()
        if not self.progress.epoch_step:  # streams begin anew
            self.step.carry = None
        batches = self.rows.batches(self.progress.epoch, self.progress.epoch_step, pieces=self.train.accumulation)
        for pieces in batches:
            if self.context.leaves(self.progress.step):
                self._leave(began)
            factor = self.recipe.schedule.factor(self.progress.step, self.num_steps)
            self.step(pieces, self.objective, rate_factor=factor)
            self.journal.stepped()
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

    def _validate(self) -> None:
        """Measure the validation split; of averaged and plain weights, choose the better ones for this epoch."""
        if self.validation is None:
            return
        self._average_buffers()
        metrics = self._measured(self.model)
        extra = {}
        if self.average:
            averaged = self._measured(self.average.module)
            better = self._rank(averaged) <= self._rank(metrics)
            self.chosen = self.average.module if better else self.model
            metrics = averaged if better else metrics
            extra = {"weights": "averaged" if better else "plain"}
        self.journal.validated(metrics, **extra)
        if not np.isfinite(metrics["loss"]):
            self._diverged("validation loss", self.progress.step)

    def _measured(self, model: nn.Module) -> dict[str, float]:
        assert self.validation is not None
        precision = self.train.precision
        figures = self.objective.figures(self.manifest.signature)
        return evaluate(
            model, self.validation, self.objective, context=self.context, precision=precision, figures=figures
        )

    def _rank(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Less is better; not finite is worst."""
        sign = -1 if self.objective.better == "more" else 1
        value, loss = sign * metrics[self.objective.best], metrics["loss"]
        return (value, loss) if np.isfinite(value + loss) else (np.inf, np.inf)

    def conclude(self) -> dict[str, Any]:
        """Evaluate the best weights on the test split. Returns what `fit` returns."""
        self.background.wait()
        self.context.share(None)  # rank 0 has written the best weights before any rank reads them
        tested = evaluate_best(self.model, self.objective, recipe=self.recipe, context=self.context)
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
        collected = self._collected(began)
        sums = collected.sums
        totals, size = sums.sum(0).tolist(), collected.size
        if not np.isfinite(totals[0]):
            first = int((~torch.isfinite(sums[:, 0])).nonzero()[0])
            self._diverged("loss", self.progress.step - len(sums) + first + 1)
        self.journal.trained(rows=collected.rows, seconds=collected.seconds, digest=collected.digest.tolist())
        extra: dict[str, Any] = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.pending.grad_norm is not None:
            extra["grad_norm"] = float(self.pending.grad_norm)
        counts = [collected.weight, *totals[size + 1 :]] if len(totals) > size else None
        self.journal.interval(
            totals[:size],
            weight=collected.weight,
            counts=counts,
            rows_per_s=collected.rows / collected.seconds,
            **extra,
        )
        return time.perf_counter()

    def _collected(self, began: float) -> Collected:
        """The steps of the interval so far, their sums over all ranks, of which those before a break are part."""
        own = self.pending.collect()
        sums = self.context.sum(own.sums)
        digest = self.context.sum(torch.from_numpy(own.digest).to(self.context.device)).cpu().numpy()
        earlier, self.pending.earlier = self.pending.earlier, None
        return replace(own, sums=sums, digest=digest, seconds=time.perf_counter() - began).after(earlier)

    def _diverged(self, what: str, step: int) -> NoReturn:
        raise self.progress.diverged(what, step=step, rate=self.step.base_rates[0])

    def _refuse_broken_weights(self) -> None:
        """Never keep weights that are NaN: the loss was taken before the step that made them so, and looks well."""
        finite = [parameter.isfinite().all() for parameter in self.model.parameters()]
        if finite and not torch.stack(finite).all():
            self._diverged("weights", self.progress.step)

    # -- the best weights, checkpoints, resuming -------------------------------------------------------------------

    def _keep_best(self) -> None:
        """Write the weights where they are the best so far."""
        about = {}
        if self.average and self.validation is not None:
            about = {"weights": "averaged" if self.chosen is self.average.module else "plain"}
        if not self.journal.note_best(self.objective.best, self.objective.better, **about):
            return
        if self.validation is None:
            self._average_buffers()
        if self.context.rank == 0:
            weights = to_cpu(self.chosen.state_dict())
            best, manifest = dict(self.progress.best or {}), self.manifest
            self.background.submit(lambda: save_model(self.context.run, weights, best=best, manifest=manifest))

    def _average_buffers(self) -> None:
        """Give all ranks the mean of their running statistics (batch normalisation's); gradients never see these."""
        if self.context.world_size > 1 and (buffers := self._buffers()):
            fill(buffers, self.context.sum(flat(buffers)) / self.context.world_size)

    def _buffers(self) -> list[Tensor]:
        modules = [self.model, *([self.average.module] if self.average else [])]
        return [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]

    def _leave(self, began: float) -> NoReturn:
        """Save all between two steps, where no checkpoint is due, so that whoever goes on comes to the same figures.

        The ranks' own running statistics are kept, as they are without this checkpoint, and so is the interval's part.
        Raises Left once that is written.
        """
        self._refuse_broken_weights()
        collected = self._collected(began)
        buffers = self._buffers()
        own = self.context.gather(flat(buffers)) if buffers else []
        self._save({"interval": collected.state() if len(collected.sums) else None, "buffers": to_cpu(own)})
        self.background.wait()
        raise Left(self.progress.step)

    def _checkpoint(self) -> None:
        """Save everything that decides how training goes on. The loop waits only for the copy, not for the writing."""
        self._average_buffers()
        self._save({})

    def _save(self, more: State) -> None:
        generators = self.context.gather(generator_state(self.context.device))
        carry = gathered(self.step.carry, self.context)
        if self.context.rank == 0:
            state: State = {
                "recipe": self.whole_recipe.model_dump_json(),
                "world_size": self.context.world_size,
                "rows": described_rows(self.manifest),
                "data": data_facts(self.manifest),
                "progress": self.journal.state(),
                "model": to_cpu(self.model.state_dict()),
                "optimizer": to_cpu(self.optimizer.state_dict()),
                "average": to_cpu(self.average.state_dict()) if self.average else None,
                "generators": [generator.cpu() for generator in generators],
                "carry": to_cpu(carry),
                **more,
            }
            step = self.progress.step
            self.background.submit(lambda: self.checkpoints.save(step, state))
        self.journal.flush()

    def _resume(self, step: int) -> None:
        state = self.checkpoints.at(step)
        with self.checkpoints.restoring(name_at(step)):
            self._take_up(state)
        self._take_saved_best()

    def _take_up(self, state: State) -> None:
        """Go on from a checkpoint's state."""
        context = self.context
        self.checkpoints.refuse_other(state, recipe=self.recipe, manifest=self.manifest)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        self.journal.progress = progress = Progress.restored(state["progress"])
        progress.refuse_other_metrics(len(self.journal.names))
        if progress.epoch_step:
            place = self.rows.order.place(progress.epoch, progress.epoch_step, context.rank, context.world_size)
            first = place.start - self.rows.order.place(progress.epoch, progress.epoch_step, 0, 1).start
            self.step.carry = on_device(of_rows(state.get("carry"), first, place.num_rows), context.device)
        if state.get("interval"):
            self.pending.earlier = Collected.restored(state["interval"], context.device)
        if own := state.get("buffers"):
            same = state["world_size"] == context.world_size
            fill(self._buffers(), own[context.rank] if same else torch.stack(own).mean(0))
        if state["world_size"] == context.world_size:
            set_generator_state(state["generators"][context.rank], context.device)
        else:
            seed_rank(self.train.seed, context.rank, progress.step)

    def _take_saved_best(self) -> None:
        """Know of the weights in RUN/model what the checkpoint, which may be older, does not.

        With another number of workers, or on a GPU, the epochs that follow need not come to the same figures again; the
        weights would then stay, and `best` would speak of others. Where they do, nothing is different at the end.
        """
        run = self.context.run
        there = self.context.rank == 0 and (run / "model").exists("model.safetensors")
        saved = self.context.share(read_model(run).best if there else None)
        if saved:
            self.progress.take_best(saved, self.objective.better)
        elif self.progress.best is not None:
            logger.warning("%s/model: the best weights are gone; the best from here on count", run)
            self.progress.best = None

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.background.close()
        finally:
            self.journal.close()
