"""Coordinator: a GAN's training from segment to segment: metrics, quality, samples, checkpoints, rollback, restarts.

A segment ends at each epoch's end, and within one where a checkpoint is due. Between segments both halves stand at the
same step and wait: there they are looked at, and saved as one unit.
"""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from cluster.adversarial.collapse import CollapseWatch, Verdict
from cluster.adversarial.features import Features
from cluster.adversarial.halves import Weights, described
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
    PlayersWarned,
    State,
    interval_ends,
)
from cluster.adversarial.quality import Quality, measured
from cluster.data.order import training_order
from cluster.data.shards import DataSet
from cluster.errors import RunFailed
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Background, Checkpoints, name_at, read_model, save_model
from cluster.training.identity import data_facts, described_rows
from cluster.training.journal import Journal, prefixed
from cluster.training.progress import Progress, means

logger = logging.getLogger(__name__)

BEST = "best-{:010d}.pt"  # beside the newest checkpoints, by its step: where a rollback returns to


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
        self.reported = objective.reported(model, data.manifest.signature)
        self.quality = Quality(features, data, recipe=recipe)
        self.watch = CollapseWatch(self.section.collapse)
        self.train = recipe.train
        self.pictures = Pictures(run / "samples", data, recipe)
        manifest = data.manifest
        order = training_order(
            manifest,
            global_batch_size=self.train.global_batch_size,
            seed=self.train.seed,
            window=recipe.data.shuffle_window,
        )
        self.epoch_steps = order.num_steps
        self.num_steps = order.num_steps * self.train.epochs
        self.checkpoints = Checkpoints(run / "checkpoints", keep=self.train.keep_checkpoints)
        self.background = Background()
        self.players: Players | None = None
        self.restarts = self.preemptions = 0
        self._began = time.time()
        self.journal = self._new_journal()

    @property
    def progress(self) -> Progress:
        """Where training stands."""
        return self.journal.progress

    def _new_journal(self) -> Journal:
        return Journal(self.run_folder, [metric.name for metric in self.reported.train])

    # -- the course of a run ---------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[dict[str, float]]:
        """All epochs that are left, each when it is asked for: its metrics, named as in result.json.

        Those of the validation split are among them where the epoch ended with a look.

        Halves whose processes die are started again, up to the recipe's max_failures times, from the newest
        checkpoint, and epochs since then are told again. Raises RunFailed where they die more often. Those that are
        warned before are saved at the end of the segment, and started elsewhere.
        """
        while True:
            try:
                yield from self._play()
                return
            except PlayersWarned as warned:
                self._close_players()
                self.preemptions += 1
                logger.warning("%s; both start again elsewhere", warned)
            except PlayersLost as lost:
                self._close_players()
                self.restarts += 1
                if self.restarts > self.train.max_failures:
                    raise RunFailed(
                        f"{lost}, more often than train.max_failures allows ({self.train.max_failures})"
                    ) from None
                logger.warning("%s; both are started again from the last checkpoint", lost)

    @property
    def ended(self) -> bool:
        """Whether no epoch is left."""
        return self.progress.ended is not None or self.progress.step >= self.num_steps

    def close(self) -> None:
        """Finish what is being written, and leave no process behind."""
        try:
            self.background.close()
        finally:
            self._close_players()
            self.journal.close()

    def _play(self) -> Iterator[dict[str, float]]:
        self.background.wait()
        self.players = self._start()
        self.journal.close()
        resumed = self._resume(self.players)
        since = self._began if self.restarts or self.preemptions else None
        self.journal.open(began=time.time(), keep_to_step=None if resumed else -1, since=since)
        if not resumed:
            self._look(self.players, epoch=0)  # the untrained halves
            self.progress.game["untrained"] = dict(self.progress.validation)
        while not self.ended:
            done = self.progress.epoch
            looked = self._segment(self.players)
            if self.progress.epoch > done:
                yield self.journal.metrics() if looked else prefixed("train", self.progress.train)
            if not self.ended and (reason := self.players.warned()):
                self._checkpoint(self.players)
                self.background.wait()
                raise PlayersWarned(f"{reason}: saved after step {self.progress.step}")

    def _segment(self, players: Players) -> bool:
        """Play to the next checkpoint or epoch's end; whether it ended with a look."""
        progress, journal = self.progress, self.journal
        first, steps = progress.step, self._segment_steps()
        began = time.perf_counter()
        played = players.play(first, steps, self.watch.learning_rate_factor)
        elapsed = time.perf_counter() - began
        journal.first_step(at=time.time() - elapsed * (1 - 1 / steps))
        finite = self._take_in(played, first, steps, elapsed)
        ended_epoch, looks = progress.step % self.epoch_steps == 0, False
        if not finite:
            sums, counts = self._sums(played.sums.sum(0))
            found = dict(zip(journal.names, means(sums, 0, counts), strict=True))
            self._heed(players, self.watch.look({**found, "diversity": 1.0}, accuracy=None))
        if ended_epoch:
            every = self.section.quality.every_epochs
            looks = finite and (self.ended or (progress.epoch + 1) % every == 0)
            if looks:
                self._look(players, epoch=progress.epoch + 1)
            progress.next_epoch()
            if looks and not self.ended:
                # epochs do not count from the untrained generator: what the first epochs make may well be worse
                progress.ended = progress.without_better(self.train.patience, first=every)
        within = self.train.checkpoint_every_steps
        due = progress.epoch % self.train.checkpoint_every_epochs == 0 if ended_epoch else bool(within)
        if due or progress.ended or progress.step == self.num_steps:
            self._checkpoint(players)
        return looks

    def _segment_steps(self) -> int:
        """To the epoch's end, or to a checkpoint within it."""
        left = self.epoch_steps - self.progress.step % self.epoch_steps
        every = self.train.checkpoint_every_steps
        return min(left, every - self.progress.step % every) if every else left

    def _take_in(self, played: Played, first: int, steps: int, elapsed: float) -> bool:
        """Write a line for each interval; whether all losses are finite."""
        progress = self.progress
        rows = int(played.sums[:, ROWS].sum())
        self.journal.trained(rows=rows, seconds=elapsed, digest=played.digest.tolist())
        for end, played_sums in zip(interval_ends(self.recipe, first, steps), played.sums, strict=True):
            self.journal.stepped(end - progress.step)
            factor = self.watch.learning_rate_factor * self.recipe.schedule.factor(end - 1, self.num_steps)
            rate = self.recipe.optimizer.lr * factor
            sums, counts = self._sums(played_sums)
            weight = float(played_sums[ROWS])  # a checkpoint holds no numbers of NumPy
            self.journal.interval(sums, weight=weight, counts=counts, rows_per_s=rows / elapsed, learning_rate=rate)
        if progress.step % self.epoch_steps == 0:
            self.journal.epoch_trained()
        return bool(np.isfinite(played.sums).all())

    def _sums(self, sums: Any) -> tuple[list[float], list[float]]:
        """The journal's metrics as sums, and what each counts: the rows, or those that the generator learned from."""
        rows, learned = float(sums[ROWS]), float(sums[GENERATOR_ROWS])
        found = {
            "generator_loss": (sums[GENERATOR], learned),
            "discriminator_loss": (sums[DISCRIMINATOR], rows),
            "real_accuracy": (sums[REAL_RIGHT], rows),
            "fake_accuracy": (sums[FAKE_RIGHT], rows),
            "l1": (sums[L1], learned),
        }
        reported = [found[name] for name in self.journal.names]
        return [float(total) for total, _ in reported], [count for _, count in reported]

    # -- quality ---------------------------------------------------------------------------------------------------

    def _look(self, players: Players, *, epoch: int) -> None:
        """Measure what the generator makes now, keep it where it is the best, and return to the best if it is bad."""
        progress = self.progress
        chosen, metrics = self._measured(players)
        self.pictures.write(progress.step, partial(players.sample, weights=chosen))
        about = {"weights": chosen} if self.train.ema_decay else {}
        self.journal.validated(metrics, **about)
        verdict = Verdict("fine")  # nothing to expect of untrained halves
        if progress.step:
            accuracy = None
            if "real_accuracy" in progress.train:  # a critic's sign tells nothing
                accuracy = (progress.train["real_accuracy"] + progress.train["fake_accuracy"]) / 2
            verdict = self.watch.look(metrics, accuracy=accuracy, improved=self._improved(metrics))
        if self.reported.best or verdict.action == "fine":  # the last one is the best, unless it has collapsed
            self._keep_best(players, metrics, epoch, chosen)
        self._heed(players, verdict)

    def _measured(self, players: Players) -> tuple[Weights, dict[str, float]]:
        """The quality of the generator: of its averaged weights and the plain ones, where both are there, the better.

        Where there is nothing to choose by, the averaged ones are measured alone.
        """
        name = self.reported.best
        kept: list[Weights] = ["averaged"] if self.train.ema_decay else ["plain"]
        if self.train.ema_decay and name:
            kept.append("plain")
        found = {weights: self.quality.measure(partial(players.sample, weights=weights)) for weights in kept}
        if name:  # a distance that is not finite is the worst
            kept.sort(key=lambda weights: np.nan_to_num(found[weights][name], nan=np.inf))
        return kept[0], found[kept[0]]

    def _improved(self, metrics: dict[str, float]) -> bool:
        """Whether the metric to choose by was never as good; where there is none, nothing says so."""
        name, best = self.reported.best, self.progress.best
        return name is not None and (best is None or metrics[name] < best["value"])

    def _keep_best(self, players: Players, metrics: dict[str, float], epoch: int, chosen: Weights) -> None:
        name = self.reported.best
        value = metrics[name] if name else -float(self.progress.step)  # nothing to choose by: the last one
        best = self.progress.best
        if not np.isfinite(value) or (best and value >= best["value"]):
            return
        self.progress.best = {
            "metric": f"validation/{name}" if name else "step",
            "value": value if name else self.progress.step,
            "epoch": epoch,
            "step": self.progress.step,
            "metrics": self.journal.metrics(),
            **({"weights": chosen} if self.train.ema_decay else {}),
        }
        found, weights, manifest = dict(self.progress.best), players.kept(chosen), self.data.manifest
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
        name = BEST.format(progress.best["step"])
        with self.checkpoints.restoring(name):
            players.load(self.checkpoints.read(name)["halves"])
        entry = {"step": progress.step, "to_step": progress.best["step"], "reason": verdict.reason}
        rollbacks = progress.game.setdefault("rollbacks", [])
        rollbacks.append({**entry, "learning_rate_factor": self.watch.learning_rate_factor})
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
        self.progress.game["watch"] = self.watch.state()
        state: State = {
            "recipe": self.recipe.model_dump_json(),
            "rows": described_rows(self.data.manifest),
            "data": data_facts(self.data.manifest),
            "progress": self.journal.state(),
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
        self.journal.flush()

    def _resume(self, players: Players) -> bool:
        """Go on from the newest checkpoint; whether there is one."""
        step = self.checkpoints.newest_step()
        self.watch = CollapseWatch(self.section.collapse)
        first_step_at, self.journal = self.journal.first_step_at, self._new_journal()
        self.journal.first_step_at = first_step_at
        if step is None:
            return False
        state = self.checkpoints.at(step)
        with self.checkpoints.restoring(name_at(step)):
            self._take_up(state, players)
        self._restore_best()
        return True

    def _take_up(self, state: State, players: Players) -> None:
        """Go on from a checkpoint's state."""
        self.checkpoints.refuse_other(state, recipe=self.recipe, manifest=self.data.manifest)
        players.load(state["halves"])
        self.journal.progress = progress = Progress.restored(state["progress"])
        if len(progress.sums) == len(SUMS) != len(self.journal.names):  # as an earlier version has added them up
            progress.sums, progress.counts = self._sums(progress.sums)
        progress.refuse_other_metrics(len(self.journal.names))
        if watch := self.progress.game.get("watch"):
            self.watch.load(watch)

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
            with self.checkpoints.restoring(name):
                kept = self.checkpoints.read(name)["kept"]
                save_model(run, kept, best=best, manifest=self.data.manifest)
        elif saved:  # of a newer checkpoint, which was damaged and has been deleted: its best halves are what is left
            self.progress.best = saved

    # -- the end ---------------------------------------------------------------------------------------------------

    def conclude(self) -> dict[str, Any]:
        """Measure the best generator on the test split. Returns what result.json holds of it."""
        self.background.wait()
        self._close_players()
        tested = None
        if self.data.manifest.rows("test"):
            tested, _ = measured(self.run_folder, self.recipe, self.data, self.features, split="test")
        with torch.device("meta"):
            halves = self.recipe.model.build(self.data.manifest.signature)
        result = self.journal.result(
            tested=tested,
            checkpoints=self.checkpoints,
            num_parameters=sum(p.numel() for p in halves.parameters()),
            world_size=self.replicas,
            restarts=self.restarts,
            preemptions=self.preemptions,
            untrained=self.progress.game.get("untrained", {}),
            rollbacks=self.progress.game.get("rollbacks", []),
        )
        return result.facts()

    def _close_players(self) -> None:
        players, self.players = self.players, None
        if players:
            players.close()
