"""sweep: many trials of one recipe, chosen by a searcher, cut short by a scheduler, run at once as far as they fit."""

import logging
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from cluster.data.prepare import prepared
from cluster.errors import Lost
from cluster.recipe.fit import check, warn_about_classes
from cluster.recipe.loading import dump_recipe, load_recipe
from cluster.recipe.recipe import Recipe
from cluster.runs.admission import (
    refuse_differences,
    refuse_other_data,
    refuse_unreadable_files,
    refuse_what_cannot_start,
    workers_of,
)
from cluster.runs.going_on import command, last_word, telling_how
from cluster.runs.sharing import other_nodes, reaching, refuse_unshared
from cluster.runtime import RaySession, ray_session
from cluster.runtime.existing import existing, refuse_temporary
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from cluster.training.identity import data_facts
from cluster.training.run_directory import environment, new_place
from cluster.tuning.budget import longest_trial, needs_of, room_for, rungs
from cluster.tuning.fused.groups import groups, pays, why_not
from cluster.tuning.fused.pruning import PruningRule
from cluster.tuning.ledger import ENDED, Status, SweepDirectory, SweepListener, TrialRecord
from cluster.tuning.messages import FusedConfig
from cluster.tuning.outcome import SweepOutcome, copy_model, trial_recipe
from cluster.tuning.roster import OpenData, Roster
from cluster.tuning.space import Space
from cluster.tuning.target import target
from nn_models.errors import Problem, UserError

logger = logging.getLogger(__name__)

MOST_FUSED = 32  # more gain little, and end later
TIDY_UP_S = 5
SMALLEST_GROUP = 4  # on average, below which training together gains next to nothing


def sweep(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    num_workers: int = 1,
    use_gpu: bool = False,
    run: str | None = None,
    address: str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    concurrency: int | None = None,
    fuse: str | int = "auto",
    overrides: Mapping[str, Any] | None = None,
    listener: SweepListener | None = None,
    verbose: bool = False,
) -> SweepOutcome:
    """Run the trials of a recipe with a `sweep` section and return how they went.

    `num_workers` is that of each trial: 1 runs it in a process of Ray Tune's, more with Ray Train inside the trial; of
    a GAN it is the number of pairs of halves. `run` is the directory to write (by default a new one under sweeps/).
    `resume` goes on with the sweep there: trials that ended are kept, others go on from their checkpoints, failed ones
    are run again where `retry_failed`. As many trials run at once as fit, at most `concurrency`.

    `fuse` says whether trials that differ only in values which can be batched (see `fused.groups.FUSABLE`) train as one
    batched model: `auto` where that pays, `off` never, a number at most so many together.

    A trial that fails never ends the sweep. Raises UserError where something must be changed first.
    """
    recipe = load_recipe(recipe, overrides)
    if recipe.sweep is None:
        raise UserError("sweep", f"{recipe.name} has no section sweep, which says what to try", "add one with a space")
    most = _most_fused(fuse)
    began_with: Recipe | None = None  # what a sweep that goes on was
    there = existing(address)
    with ExitStack() as stack:
        directory = SweepDirectory(run or stack.enter_context(new_place("sweeps", recipe)))
        refuse_temporary(directory.folder)
        asked: dict[str, Any] = {"num_workers": num_workers, "address": address, "concurrency": concurrency}
        line = again(str(directory), use_gpu=use_gpu, fuse=fuse, **asked)
        told = stack.enter_context(telling_how(line))
        if resume:
            began_with = _refuse_other(recipe, directory)
        else:
            directory.refuse_occupied()
        running = _Sweep(recipe, directory, num_workers, use_gpu)
        if began_with is not None:
            stack.enter_context(directory.folder.claimed())
            refuse_other_data(recipe, began_with, running.manifest, directory.folder)
            running.roster.take_up(retry_failed)
            if (done := directory.result()) and done["status"] == "finished" and not running.roster.left:
                return running.outcome(done)
        cpus = running.embedded_cpus(concurrency)
        from cluster.tuning.tune import configure_tune

        configure_tune()
        session = stack.enter_context(ray_session(address=there, cpus=cpus, verbose=verbose))
        running.refuse_what_never_fits(session, concurrency)
        running.share(session)
        running.fuse(most)
        if began_with is not None:
            directory.write_start(recipe, running.environment | {"seed": recipe.sweep.seed})
        else:
            directory.begin(recipe, running.environment | {"seed": recipe.sweep.seed})
            stack.enter_context(directory.folder.claimed())
        told.begun = True

        def say(reason: str) -> str:
            running.conclude("failed")
            return f"{reason}; to go on: {line}"

        stack.enter_context(last_word(session, say))
        return running.run(session, listener)


def again(
    run: str, *, num_workers: int, use_gpu: bool, address: str | None, concurrency: int | None, fuse: str | int
) -> str:
    """The line that goes on with a sweep."""
    options = {
        "--workers": num_workers if num_workers != 1 else None,
        "--address": address,
        "--concurrency": concurrency,
        "--fuse": fuse if fuse != "auto" else None,
    }
    return command("sweep", run, options, use_gpu=use_gpu)


def _refuse_other(recipe: Recipe, directory: SweepDirectory) -> Recipe:
    """A sweep goes on with the recipe that it began with, which is returned, but for what decides no result."""
    if not directory.exists():
        raise UserError("--resume", f"{directory} holds no sweep to continue", "check --run, or leave out --resume")
    began_with = directory.recipe()
    refuse_differences(recipe, began_with, directory.folder)
    return began_with


def _most_fused(fuse: str | int) -> int | None:
    """Trials that train together at most; None to let the sweep choose."""
    if fuse == "auto":
        return None
    if fuse == "off":
        return 1
    if str(fuse).isdecimal() and int(fuse) >= 2:
        return int(fuse)
    raise UserError("--fuse", f"{fuse!r} is not auto, off or a number of trials of at least 2 that train together")


class _Sweep:
    """A sweep that can start: its trials' needs and data are known, and what cannot be has been refused."""

    def __init__(self, recipe: Recipe, directory: SweepDirectory, num_workers: int, use_gpu: bool) -> None:
        assert recipe.sweep is not None
        self.began = time.time()
        self.recipe, self.spec, self.directory = recipe, recipe.sweep, directory
        self.base = recipe.model_copy(update={"sweep": None})
        self.space = Space(self.spec)
        self.manifest = prepared(recipe.data).manifest
        self.space.check(recipe, self.manifest)
        check(self.base, self.manifest)
        warn_about_classes(self.manifest, self.base)
        self.target = target(recipe, self.manifest)
        self.workers = workers_of(self.base, num_workers, use_gpu, alone=False)
        self.grouped = self.workers.coordinated or self.workers.most > 1
        if self.spec.scheduler == "pbt" and self.grouped:
            raise UserError(
                "sweep.scheduler",
                "pbt exchanges the state of trials of one worker only",
                "leave out --workers, or choose asha",
            )
        self.needs = needs_of(self.workers)
        self.data = OpenData()
        refuse_what_cannot_start(self.base, self.data.of(self.base)[1], self.workers)
        refuse_unreadable_files(self.base, self.manifest)
        self.most_fused, self.fuse_asked = 1, False
        self.num_workers = num_workers
        self.environment = environment(
            seed=recipe.train.seed,
            num_workers=num_workers,
            use_gpu=use_gpu,
            device="",
            data=data_facts(self.manifest),
        )
        self.roster = Roster(recipe, self.space, self.target, directory, self.data)
        self.state = self.roster.state

    def embedded_cpus(self, concurrency: int | None) -> int:
        """The logical CPUs of a Ray of our own: nothing else limits how much of a population runs at once."""
        needed = math.ceil(sum(bundle["CPU"] for bundle in self.needs.all))
        if self.spec.scheduler == "pbt" and concurrency:
            return needed * concurrency
        return max(os.cpu_count() or 1, needed)

    def refuse_what_never_fits(self, session: RaySession, concurrency: int | None) -> None:
        """Settle how many trials run at once. Raises UserError where not even one will ever fit."""
        ray = session.ray
        if self.spec.scheduler == "pbt" and concurrency and not session.embedded:
            raise UserError(
                "--concurrency",
                "the trials of a population run at once as far as the cluster has room for them",
                "leave it out, or leave out --address",
            )
        from ray._private.state import state  # the autoscaler's limits have no public way to be asked for

        limits = state.get_max_resources_from_cluster_config()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = room_for(self.needs, nodes)
        if not room and not (limits and room_for(self.needs, [limits])):
            have = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
            raise UserError(
                "--workers",
                f"a trial needs {self.needs.text}, its own process included, and the cluster has {have['CPU']:g} CPU "
                f"and {have['GPU']:g} GPU on {len(nodes)} node{'s' * (len(nodes) != 1)}, so not even one fits",
                "ask for fewer workers, or for less with train.cpus_per_worker",
            )
        grown = room_for(self.needs, [limits]) if limits else 0
        self.state.concurrency = max(1, min(concurrency or 10_000, max(room, grown)))

    def share(self, session: RaySession) -> None:
        """See that trials on any node find the sweep's directory, and the data where they read its files themselves."""
        nodes = other_nodes(session, self.workers)
        refuse_unshared(session, nodes, self.directory.folder)
        for where, (data, splits) in self.data.opened.items():
            if "train" not in splits.tables or self.workers.coordinated:
                self.data.opened[where] = data, reaching(session, nodes, data, splits)

    def fuse(self, most: int | None) -> None:
        """Settle whether trials train together, and how many. Raises UserError where they were to, and cannot."""
        reason = why_not(self.base, self.manifest)
        if self.grouped:
            reason = Problem("--workers", "each trial has several processes")
        elif self.spec.scheduler == "pbt":
            reason = Problem("sweep.scheduler", "pbt exchanges the state of single trials")
        elif self.spec.searcher == "optuna":
            reason = Problem("sweep.searcher", "optuna learns from trials that have ended before it chooses the next")
        if reason and most is not None and most > 1:
            raise UserError("--fuse", f"{most}: these trials cannot train together ({reason})", "leave it out")
        self.fuse_asked = most is not None
        if most is None:
            if reason is None and pays(self.base, self.manifest):
                # all slots shall have a group
                self.most_fused = min(MOST_FUSED, -(-self.space.num_trials // self.state.concurrency))
        elif reason is None:
            self.most_fused = most

    def run(self, session: Any, listener: SweepListener | None) -> SweepOutcome:
        """All trials that are left."""
        from cluster.tuning import tune
        from cluster.tuning.fused.trial import FusedTrial
        from cluster.tuning.trials import EpochTrial, RayTrainTrial, World

        roster = self.roster
        roster.listener = listener
        stored = {
            where: (replace(splits, tables={}), session.references(splits.tables))
            for where, (_, splits) in self.data.opened.items()
        }
        world = World(
            data=stored,
            workers=self.workers,
            num_workers=self.num_workers if self.grouped else 0,
            environment=self.environment,
            embedded=session.embedded,
            path=list(sys.path),
            folder=session.folder,
        )
        # the placement groups of Ray Train's that trials leave when they are killed would keep others from starting
        nested = self.grouped and not self.workers.coordinated
        listening = tune.Listening(
            on_start=roster.on_start,
            on_epoch=roster.on_epoch,
            on_end=roster.on_end,
            look=session.refuse_lost,
            tidy=session.remove_orphaned_groups if nested else None,
        )
        trainable: Any = RayTrainTrial if nested else EpochTrial
        next_trial: tune.Next = roster.next
        left, scheduler = roster.left, None
        together = self._fused_groups() if self.most_fused > 1 else None
        if together:
            trainable = FusedTrial
            next_trial, left = lambda: together.pop(0) if together else None, len(together)
        else:
            scheduler = tune.scheduler_of(
                self.spec,
                longest_trial(self.recipe, self.space),
                metric=self.target.metric,
                mode=self.target.mode,
                past=roster.past,
                mutate=roster.mutated,
            )
        try:
            if left:
                tune.run_trials(
                    trainable,
                    world,
                    next_trial=next_trial,
                    num_trials=left,
                    scheduler=scheduler,
                    bundles=self.needs.bundles,
                    concurrency=self.state.concurrency,
                    reuse=not self.grouped,
                    max_failures=self.spec.max_failures,
                    listening=listening,
                    folder=session.folder,
                )
        except BaseException as error:
            with suppress(Lost):  # told already
                self.conclude("failed" if isinstance(error, Exception) else "stopped")
            raise
        finally:
            if nested and session.lost() is None:
                _tidy_up(session)
        return self.outcome(self.conclude("finished"))

    def _fused_groups(self) -> list[FusedConfig]:
        """All trials that are left, in groups that can train together; none where that was not asked for, nor pays.

        It does not pay where groups are small. And dropout draws otherwise in a group than alone, so that the best
        trial's recipe would not give the same figures again.
        """
        trials = []
        while (trial := self.roster.next()) is not None:
            trials.append(trial)
        recipes = [trial.recipe for trial in trials]
        found_groups = []
        for places in _side_by_side([trial.run for trial in trials]):
            together = groups([recipes[place] for place in places], self.most_fused, manifest=self.manifest)
            found_groups += [[places[number] for number in group] for group in together]
        drops = any(getattr(recipe.model, "dropout", 0) for recipe in recipes)
        if not self.fuse_asked and (drops or len(trials) < SMALLEST_GROUP * len(found_groups)):
            self.most_fused = 1
            self.roster.put_back(trials)
            return []
        spec, epochs = self.spec, longest_trial(self.recipe, self.space)
        assert spec.scheduler != "pbt"  # see fuse
        rule = PruningRule(
            scheduler=spec.scheduler,
            metric=self.target.metric,
            mode=self.target.mode,
            rungs=tuple(rungs(epochs, spec.grace_epochs, spec.reduction_factor)),
            reduction_factor=spec.reduction_factor,
            grace_epochs=spec.grace_epochs,
        )
        return [FusedConfig(tuple(trials[place] for place in group), rule) for group in found_groups]

    # -- the end -----------------------------------------------------------------------------------------------------

    def outcome(self, result: dict[str, Any]) -> SweepOutcome:
        """What `sweep` returns."""
        best = self.state.best()
        recipe = self._best_recipe(best) if best else None
        return SweepOutcome(result["status"], recipe, best, self.state.records, str(self.directory), result)

    def _best_recipe(self, best: TrialRecord) -> Recipe:
        """What `manta train` runs to get the best trial again; of a population, with the changes it went through."""
        return trial_recipe(self.recipe, best, name=f"{self.recipe.name}-best")

    def conclude(self, status: str) -> dict[str, Any]:
        """Write what the sweep came to. Returns what result.json says."""
        best = self.state.best()
        records = self.state.records
        for record in records:
            if record.status not in ENDED:
                record.lineage = self.directory.lineage(record.index)
                self.directory.write(record)
        self.directory.write_tables(records)
        wall_s = time.time() - self.began
        result: dict[str, Any] = {
            "status": status,
            "metric": self.target.metric,
            "mode": self.target.mode,
            "best": None,
            "metrics": dict(best.metrics) if best else {},
            "trials": {name: self.state.count(name) for name in get_args(Status)},
            "epochs": sum(record.epochs for record in records),
            "concurrency": self.state.concurrency,
            "fused": self.most_fused,
            "wall_s": round(wall_s, 3),
            "trials_per_hour": round(3600 * self.roster.num_ended / wall_s, 1),
        }
        if best:
            result["best"] = {"trial": best.index, "value": best.value, "overrides": best.overrides}
            self.directory.folder.write_text("best.yaml", dump_recipe(self._best_recipe(best)))
            copy_model(self.directory, best.index)
        self.directory.write_result(result)
        return result


def _tidy_up(session: RaySession) -> None:
    """Remove what killed trials have left, once Ray knows that they are dead."""
    until = time.monotonic() + TIDY_UP_S
    while session.remove_orphaned_groups() and time.monotonic() < until:
        time.sleep(0.1)


def _side_by_side(runs: Sequence[str]) -> list[list[int]]:
    """Places of the runs that stand at the same step: only these can train together."""
    found: dict[int | None, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        found[Checkpoints(Folder(run) / "checkpoints", keep=1).newest_step()].append(place)
    return list(found.values())
