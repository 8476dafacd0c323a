"""Coordinator: a GAN's training from segment to segment: metrics, quality, samples, checkpoints, rollback, restarts.

A segment ends at each epoch's end, and within one where a checkpoint is due. Between segments both halves stand at the
same step and wait: there they are looked at, and saved as one unit.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from cluster.adversarial.collapse import CollapseWatch, Verdict
from cluster.adversarial.features import Features
from cluster.adversarial.halves import described
from cluster.adversarial.pictures import Pictures
from cluster.adversarial.players import (
    DISCRIMINATOR,
    FAKE_RIGHT,
    GENERATOR,
    GENERATOR_ROWS,
    L1,
    REAL_RIGHT,
    ROWS,
    SUMS,
    Played,
    Players,
    PlayersLost,
    State,
    interval_ends,
)
from cluster.adversarial.quality import Quality, measured
from cluster.data.keys import digest_text
from cluster.data.order import training_order
from cluster.data.shards import DataSet
from cluster.errors import RunFailed
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Background, Checkpoints, described_rows, read_model, save_model
from cluster.training.evaluation import prefixed
from cluster.training.run_directory import Recorder, RunDirectory

logger = logging.getLogger(__name__)

BEST = "best-{:010d}.pt"  # beside the newest checkpoints, by its step: where a rollback returns to


@dataclass
class Progress:
    """Where training stands: all that a checkpoint holds beside the halves."""

    step: int = 0
    epoch: int = 0
    epoch_sums: list[float] = field(default_factory=lambda: [0.0] * len(SUMS))  # of this epoch's steps
    digest: list[int] = field(default_factory=lambda: [0, 0])
    watch: dict[str, Any] = field(default_factory=dict)
    train: dict[str, float] = field(default_factory=dict)  # metrics of the last whole epoch
    validation: dict[str, float] = field(default_factory=dict)
    untrained: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    ended: str | None = None  # why training ended before its last epoch
    time_s: float = 0.0
    train_s: float = 0.0
    train_rows: int = 0


class Coordinator:
    """One run of a recipe with two halves."""

    def __init__(
        self,
        recipe: Recipe,
        data: DataSet,
        *,
        run: Folder,
        features: Features | None,
        start: Callable[[], Players],
        replicas: int,
    ) -> None:
        """`start` makes players, newly initialised; it may raise PlayersLost."""
        self.recipe, self.data, self.run_folder = recipe, data, run
        self.features, self.replicas = features, replicas
        self._start = start
        model, objective, self.section = described(recipe)
        self.quality = Quality(features, data, spec=model, quality=self.section.quality)
        self.watch = CollapseWatch(self.section.collapse)
        self.train = recipe.train
        self.tells_apart = objective.loss != "wasserstein"  # its critic's sign says nothing
        self.pictures = Pictures(run / "samples", data, model)
        manifest = data.manifest
        order = training_order(
            manifest,
            global_batch_size=self.train.global_batch_size,
            seed=self.train.seed,
            window=recipe.data.shuffle_window,
        )
        self.epoch_steps = order.num_steps
        self.num_steps = order.num_steps * self.train.epochs
        self.rows_used = described_rows(manifest)
        self.checkpoints = Checkpoints(run / "checkpoints", keep=self.train.keep_checkpoints)
        self.background = Background()
        self.players: Players | None = None
        self.recorder: Recorder | None = None
        self.first_step_at: float | None = None
        self.restarts = 0
        self.progress = Progress()

    # -- the course of a run ---------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, from the newest checkpoint where there is one, and measure the best generator on the test split.

        Halves whose processes die are started again, up to the recipe's max_failures times, from the newest
        checkpoint. Raises RunFailed where they die more often.
        """
        try:
            while True:
                try:
                    self._train()
                    return self._conclude()
                except PlayersLost as lost:
                    self._close_players()
                    self.restarts += 1
                    if self.restarts > self.train.max_failures:
                        raise RunFailed(
                            f"{lost}, more often than train.max_failures allows ({self.train.max_failures})"
                        ) from None
                    logger.warning("%s; both are started again from the last checkpoint", lost)
        finally:
            try:
                self.background.close()
            finally:
                self._close_players()
                if self.recorder:
                    self.recorder.close()

    def _train(self) -> None:
        self.background.wait()
        self.players = self._start()
        resumed = self._resume(self.players)
        if self.recorder:
            self.recorder.close()
        keep_to_step = self.progress.step if resumed else -1
        self.recorder = Recorder(RunDirectory(self.run_folder), keep_to_step=keep_to_step)
        self.clock = time.time() - self.progress.time_s
        if not resumed:
            self._look(self.players, epoch=0)
            self.progress.untrained = dict(self.progress.validation)
        while self.progress.step < self.num_steps and not self.progress.ended:
            self._segment(self.players)

    def _segment(self, players: Players) -> None:
        progress = self.progress
        first, steps = progress.step, self._segment_steps()
        began = time.perf_counter()
        played = players.play(first, steps, self.watch.learning_rate_factor)
        elapsed = time.perf_counter() - began
        if self.first_step_at is None:
            self.first_step_at = time.time() - elapsed * (1 - 1 / steps)
        finite = self._take_in(played, first, steps, elapsed)
        ended_epoch = progress.step % self.epoch_steps == 0
        if not finite:
            self._heed(players, self.watch.look({**self._metrics(played.sums.sum(0)), "diversity": 1.0}, accuracy=None))
        if ended_epoch:
            last = progress.step == self.num_steps
            if finite and (last or (progress.epoch + 1) % self.section.quality.every_epochs == 0):
                self._look(players, epoch=progress.epoch)
                if not last and not progress.ended:
                    progress.ended = self._out_of_patience()
            progress.epoch += 1
            progress.epoch_sums, progress.digest = [0.0] * len(SUMS), [0, 0]
        within = self.train.checkpoint_every_steps
        due = progress.epoch % self.train.checkpoint_every_epochs == 0 if ended_epoch else bool(within)
        if due or progress.ended or progress.step == self.num_steps:
            self._checkpoint(players)

    def _segment_steps(self) -> int:
        """To the epoch's end, or to a checkpoint within it."""
        left = self.epoch_steps - self.progress.step % self.epoch_steps
        every = self.train.checkpoint_every_steps
        return min(left, every - self.progress.step % every) if every else left

    def _take_in(self, played: Played, first: int, steps: int, elapsed: float) -> bool:
        """Write a line for each interval; whether all losses are finite."""
        progress = self.progress
        rows = int(played.sums[:, ROWS].sum())
        progress.train_s += elapsed
        progress.train_rows += rows
        progress.digest = [old + int(new) for old, new in zip(progress.digest, played.digest, strict=True)]
        totals = played.sums.sum(0).tolist()
        progress.epoch_sums = [old + new for old, new in zip(progress.epoch_sums, totals, strict=True)]
        for end, sums in zip(interval_ends(self.recipe, first, steps), played.sums, strict=True):
            progress.step = end
            factor = self.watch.learning_rate_factor * self.recipe.schedule.factor(end - 1, self.num_steps)
            rate = self.recipe.optimizer.lr * factor
            self._log("train", self._metrics(sums), rows_per_s=rows / elapsed, learning_rate=rate)
        if progress.step % self.epoch_steps == 0:
            progress.train = self._metrics(progress.epoch_sums)
            self._log("train", progress.train, rows_digest=digest_text(progress.digest), end_of_epoch=True)
        return bool(np.isfinite(played.sums).all())

    def _metrics(self, sums: Any) -> dict[str, float]:
        rows, learned = sums[ROWS], max(sums[GENERATOR_ROWS], 1.0)
        metrics = {"generator_loss": sums[GENERATOR] / learned, "discriminator_loss": sums[DISCRIMINATOR] / rows}
        if self.tells_apart:
            metrics |= {"real_accuracy": sums[REAL_RIGHT] / rows, "fake_accuracy": sums[FAKE_RIGHT] / rows}
        if described(self.recipe)[1].l1_weight:
            metrics["l1"] = sums[L1] / learned
        return {name: float(value) for name, value in metrics.items()}

    # -- quality ---------------------------------------------------------------------------------------------------

    def _look(self, players: Players, *, epoch: int) -> None:
        """Measure what the generator makes now, keep it where it is the best, and return to the best if it is bad."""
        progress = self.progress
        metrics = self.quality.measure(players.sample)
        progress.validation = metrics
        self.pictures.write(progress.step, players.sample)
        self._log("validation", metrics)
        verdict = Verdict("fine")  # nothing to expect of untrained halves
        if progress.step:
            accuracy = None
            if self.tells_apart:
                accuracy = (progress.train["real_accuracy"] + progress.train["fake_accuracy"]) / 2
            verdict = self.watch.look(metrics, accuracy=accuracy, improved=self._improved(metrics))
        if self.quality.best_metric or verdict.action == "fine":  # the last one is the best, unless it has collapsed
            self._keep_best(players, metrics, epoch)
        self._heed(players, verdict)

    def _out_of_patience(self) -> str | None:
        """Why to end after this epoch's look, where train.patience epochs have gone by without a better generator.

        Epochs count from the look that found the best, but not from that at the untrained generator: what the first
        epochs make may well be worse.
        """
        patience, best = self.train.patience, self.progress.best
        if not patience or not best:
            return None
        first_look = self.section.quality.every_epochs - 1
        without = self.progress.epoch - max(best["epoch"], first_look)
        return f"no better for {without} epochs" if without >= patience else None

    def _improved(self, metrics: dict[str, float]) -> bool:
        """Whether the metric to choose by was never as good; where there is none, nothing says so."""
        name, best = self.quality.best_metric, self.progress.best
        return name is not None and (best is None or metrics[name] < best["value"])

    def _keep_best(self, players: Players, metrics: dict[str, float], epoch: int) -> None:
        name = self.quality.best_metric
        value = metrics[name] if name else -float(self.progress.step)  # nothing to choose by: the last one
        best = self.progress.best
        if not np.isfinite(value) or (best and value >= best["value"]):
            return
        self.progress.best = {
            "metric": f"validation/{name}" if name else "step",
            "value": value if name else self.progress.step,
            "epoch": epoch,
            "step": self.progress.step,
        }
        found, weights, manifest = dict(self.progress.best), players.kept(), self.data.manifest
        state = {"halves": players.state(), "kept": weights, "progress": {}}
        self.background.submit(lambda: self.checkpoints.save_as(BEST.format(found["step"]), state))
        self.background.submit(lambda: save_model(self.run_folder, weights, best=found, manifest=manifest))

    def _heed(self, players: Players, verdict: Verdict) -> None:
        """Return both halves to the best checkpoint with lower learning rates, or end, where the verdict says so.

        Steps are counted on: the same rows and the same noise would only lead to the same end.
        """
        progress = self.progress
        if verdict.action == "fine":
            return
        assert progress.best is not None  # the untrained halves, at least
        if verdict.action == "stop":
            progress.ended = verdict.reason
            logger.warning("step %d: %s; training ends here", progress.step, verdict.reason)
            return
        self.background.wait()  # the best may still be on its way
        players.load(self.checkpoints.read(BEST.format(progress.best["step"]))["halves"])
        entry = {"step": progress.step, "to_step": progress.best["step"], "reason": verdict.reason}
        progress.rollbacks.append({**entry, "learning_rate_factor": self.watch.learning_rate_factor})
        logger.warning(
            "step %d: %s; both halves return to their best, of step %d, with %g times the learning rates",
            progress.step,
            verdict.reason,
            progress.best["step"],
            self.watch.learning_rate_factor,
        )

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _checkpoint(self, players: Players) -> None:
        """Save both halves as one unit, and everything that decides how the game goes on."""
        self.progress.time_s = time.time() - self.clock
        self.progress.watch = self.watch.state()
        state: State = {
            "recipe": self.recipe.model_dump_json(),
            "rows": self.rows_used,
            "progress": asdict(self.progress),
            "halves": players.state(),
        }
        step, best = self.progress.step, self.progress.best
        kept = BEST.format(best["step"]) if best else None

        def write() -> None:
            self.checkpoints.save(step, state)
            # not before: where this checkpoint is not written, the one before it needs its own best
            for name in self.checkpoints.folder.names():
                if name.startswith("best-") and name != kept:
                    self.checkpoints.folder.delete(name)

        self.background.submit(write)
        if self.recorder:
            self.recorder.flush()

    def _resume(self, players: Players) -> bool:
        """Go on from the newest checkpoint; whether there is one."""
        state = self.checkpoints.newest()
        self.watch = CollapseWatch(self.section.collapse)
        if state is None:
            self.progress = Progress()
            return False
        self.checkpoints.refuse_other(state, recipe=self.recipe, rows=self.rows_used)
        players.load(state["halves"])
        self.progress = Progress(**state["progress"])
        if self.progress.watch:
            self.watch.load(self.progress.watch)
        self._restore_best()
        return True

    def _restore_best(self) -> None:
        """Make RUN/model what the checkpoint knows as the best.

        A better one may have been found after the checkpoint. The game that now goes on need not find it again, and
        `best` would speak of other weights than those in RUN/model.
        """
        best, run = self.progress.best, self.run_folder
        saved = read_model(run).best if (run / "model").exists("model.safetensors") else None
        if best is None or saved == best:
            return
        name = BEST.format(best["step"])
        if self.checkpoints.folder.exists(name):
            save_model(run, self.checkpoints.read(name)["kept"], best=best, manifest=self.data.manifest)
        elif saved:  # of a newer checkpoint, which was damaged and has been deleted: its best halves are what is left
            self.progress.best = saved

    # -- the end ---------------------------------------------------------------------------------------------------

    def _conclude(self) -> dict[str, Any]:
        """Measure the best generator on the test split."""
        self.background.wait()
        self._close_players()
        progress = self.progress
        metrics = prefixed("train", progress.train) | prefixed("validation", progress.validation)
        if self.data.manifest.rows("test"):
            tested = measured(self.run_folder, self.recipe, self.data, self.features, split="test")
            self._log("test", tested)
            metrics |= prefixed("test", tested)
        names = self.checkpoints.names()
        with torch.device("meta"):
            halves = self.recipe.model.build(self.data.manifest.signature)
        return {
            "metrics": metrics,
            "best": dict(progress.best or {}),
            "untrained": progress.untrained,
            "checkpoint": f"checkpoints/{names[-1]}" if names else None,
            "steps": progress.step,
            "epochs": progress.epoch,
            "stopped_early": progress.ended is not None,
            "ended": progress.ended,
            "rollbacks": progress.rollbacks,
            "rows_per_s": progress.train_rows / progress.train_s if progress.train_s else None,
            "num_parameters": sum(p.numel() for p in halves.parameters()),
            "world_size": self.replicas,
            "first_step_at": self.first_step_at,
            "restarts": self.restarts,
        }

    def _close_players(self) -> None:
        players, self.players = self.players, None
        if players:
            players.close()

    def _log(self, split: str, metrics: dict[str, float], **extra: Any) -> None:
        entry = {"step": self.progress.step, "epoch": self.progress.epoch, "split": split, **metrics, **extra}
        if self.recorder:
            self.recorder.append({**entry, "time_s": round(time.time() - self.clock, 3)})
