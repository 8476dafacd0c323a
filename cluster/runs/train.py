"""train: one recipe from data to result, in this process or on Ray."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.data.prepare import prepared
from cluster.errors import Lost, RunFailed
from cluster.recipe.fit import check, warn_about_classes
from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.runs.admission import (
    refuse_other_data,
    refuse_other_recipe,
    refuse_unreadable_files,
    refuse_what_cannot_start,
    workers_of,
)
from cluster.runs.going_on import command, last_word, telling_how
from cluster.runs.sharing import other_nodes, reaching, refuse_unshared
from cluster.runs.tail import Listener, Tail
from cluster.runtime import (
    RaySession,
    Workers,
    device_name,
    local_device,
    ray_session,
    refuse_unplaceable,
    warn_about_cores,
)
from cluster.runtime.existing import existing, refuse_temporary
from cluster.storage import Folder
from cluster.training.context import LocalContext
from cluster.training.identity import data_facts
from cluster.training.leaving import Leaves, never, saved_on_sigterm
from cluster.training.run_directory import RunDirectory, environment, new_place, result_of
from cluster.training.splits import Splits, open_splits
from nn_models.errors import UserError

if TYPE_CHECKING:
    from cluster.adversarial.coordinator import Coordinator
    from cluster.runs.predictor import OpenedModel
    from cluster.training.checkpoints import Background
    from cluster.training.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `metrics` are those of the weights that it keeps, named as in result.json (`test/accuracy`).

    `run` is its directory. `result` has all of result.json: `best` says which weights these are, `last` what the last
    epoch came to.
    """

    status: str  # finished; a run that fails or is stopped raises, and result.json says so
    metrics: dict[str, float]
    run: str
    result: dict[str, Any]

    def load_model(self) -> "OpenedModel":
        """The best model, on the CPU, as `cluster.open_model` opens it: it takes what the data's files hold."""
        from cluster.runs.opened import open_model

        return open_model(self.run)


def train(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    num_workers: int | tuple[int, int] = 0,
    use_gpu: bool = False,
    run: str | None = None,
    address: str | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
    verbose: bool = False,
) -> Outcome:
    """Train a recipe (a built-in name, a file, a dict or a Recipe) and return how it ended.

    `num_workers` 0 trains in this process without Ray; a pair is a range for elastic runs. `run` is the directory to
    write (by default a new one under runs/); `resume` continues it from its newest checkpoint. `address` is an
    existing Ray cluster's, by default that of RAY_ADDRESS; where neither is there, Ray is started on this machine.
    `listener` is called with each line of metrics.

    Raises UserError where something must be changed first, RunFailed (result.json says `failed` then) where the run
    could not finish. KeyboardInterrupt leaves result.json with the status `stopped`.
    """
    began = time.time()
    recipe = load_recipe(recipe, overrides).model_copy(update={"sweep": None})  # of `manta sweep` only
    began_with: Recipe | None = None  # what a run that goes on was
    finished: Outcome | None = None
    there = existing(address, wanted=bool(num_workers))
    with ExitStack() as stack:
        directory = RunDirectory(stack.enter_context(new_place("runs", recipe)) if run is None else run)
        refuse_temporary(directory.folder)
        line = again(str(directory), num_workers=num_workers, use_gpu=use_gpu, address=address)
        told = stack.enter_context(telling_how(line))
        if resume and directory.exists():
            stack.enter_context(directory.folder.claimed())
            began_with = refuse_other_recipe(recipe, directory)
            done = directory.result()
            if done and done["status"] == "finished":
                finished = Outcome("finished", done["metrics"], str(directory), done)
                if recipe.data == began_with.data:
                    return finished
        elif resume:
            raise UserError("--resume", f"{directory} holds no run to continue", "check --run, or leave out --resume")
        else:
            directory.refuse_occupied()  # before minutes of work; `begin` claims it once nothing else can be wrong
        workers = workers_of(recipe, num_workers, use_gpu, alone=there is None)
        data = prepared(recipe.data)
        if began_with:
            refuse_other_data(recipe, began_with, data.manifest, directory.folder)
        if finished:
            return finished
        check(recipe, data.manifest)
        warn_about_classes(data.manifest, recipe)
        splits = open_splits(data, window=recipe.data.shuffle_window)
        refuse_what_cannot_start(recipe, splits, workers)
        if not began_with:
            refuse_unreadable_files(recipe, data.manifest)

        device = device_name(use_gpu)
        facts = environment(
            seed=recipe.train.seed,
            num_workers=num_workers,
            use_gpu=use_gpu,
            device=device,
            data=data_facts(data.manifest),
        )
        session = None
        if workers.most:
            cpus = workers.most * workers.cpus
            session = stack.enter_context(ray_session(address=there, cpus=cpus, verbose=verbose))
            if session.embedded:
                warn_about_cores(workers)
            refuse_unplaceable(session.ray, workers)
            nodes = other_nodes(session, workers)
            if not workers.coordinated:  # else this process writes all of it
                refuse_unshared(session, nodes, directory.folder)
            if "train" not in splits.tables:
                splits = reaching(session, nodes, data, splits)
        if resume:
            directory.write_start(recipe, facts)
        else:
            directory.begin(recipe, facts)
            stack.enter_context(directory.folder.claimed())
        told.begun = True

        def say(reason: str) -> str:
            write_end({"status": "failed", "error": reason}, directory, num_workers=num_workers, began=began)
            return f"{reason}; to go on: {line}"

        stack.enter_context(last_word(session, say))
        result = run_here(
            recipe, splits, directory, workers, session, num_workers=num_workers, listener=listener, began=began
        )
    return Outcome(result["status"], result["metrics"], str(directory), result)


def again(run: str, *, num_workers: int | tuple[int, int], use_gpu: bool, address: str | None) -> str:
    """The line that goes on with a run."""
    workers = num_workers if isinstance(num_workers, int) else "{}-{}".format(*num_workers)
    return command("train", run, {"--workers": workers or None, "--address": address}, use_gpu=use_gpu)


def run_here(
    recipe: Recipe,
    splits: Splits,
    directory: RunDirectory,
    workers: Workers,
    session: RaySession | None,
    *,
    num_workers: int | tuple[int, int],
    listener: Listener | None = None,
    began: float,
) -> dict[str, Any]:
    """Train in a run's directory that has begun, and leave result.json there, whatever happens. Returns what it says.

    Raises UserError, RunFailed or KeyboardInterrupt as `train` does.
    """
    told: dict[str, Any] = {"num_workers": num_workers, "began": began}
    with ExitStack() as stack:
        if listener:
            stack.enter_context(Tail(directory, listener))
        try:
            found = _fit(recipe, splits, directory, workers, session)
        except BaseException as error:
            failed = {"status": "failed", "error": str(error)}
            with suppress(Lost, UserError):  # where the directory is what failed, that has been said
                write_end(failed if isinstance(error, Exception) else {"status": "stopped"}, directory, **told)
            if isinstance(error, (UserError, RunFailed)) or not isinstance(error, Exception):
                raise
            raise RunFailed(f"{type(error).__name__}: {error}") from error
        return write_end({"status": "finished", **found}, directory, **told)


def write_end(
    status: dict[str, Any], directory: RunDirectory, *, num_workers: int | tuple[int, int], began: float
) -> dict[str, Any]:
    """Leave result.json of a run that has ended so. Returns what it says."""
    result = {**result_of(status, directory, began), "num_workers": num_workers}
    directory.write_result(result)
    return result


def _fit(
    recipe: Recipe,
    splits: Splits,
    directory: RunDirectory,
    workers: Workers,
    session: RaySession | None,
) -> dict[str, Any]:
    """What the training returns, driven from this process or run in Ray Train's workers."""
    if session is not None and not workers.coordinated:
        from cluster.training.ray_train import train_on_ray

        return train_on_ray(recipe, splits, run=directory.folder, workers=workers, session=session)
    with (
        saved_on_sigterm() if not workers.coordinated else nullcontext(never) as leaves,
        closing(open_training(recipe, splits, directory.folder, workers, session, leaves=leaves)) as training,
    ):
        for _ in training.epochs():
            pass
        return training.conclude()


class Training(Protocol):
    """A run that one process drives epoch by epoch. `close` must be called at the end."""

    background: "Background"  # writes its checkpoints and weights

    @property
    def progress(self) -> "Progress":
        """Where it stands."""

    @property
    def ended(self) -> bool:
        """Whether no epoch is left."""

    def epochs(self) -> Iterator[dict[str, float]]:
        """All epochs that are left, each when it is asked for: its metrics, named as in result.json."""

    def conclude(self) -> dict[str, Any]:
        """Evaluate the best weights on the test split. Returns what result.json holds of the run."""

    def close(self) -> None:
        """Finish what is being written, and leave no process behind."""


def open_training(
    recipe: Recipe,
    splits: Splits,
    run: Folder,
    workers: Workers,
    session: RaySession | None,
    *,
    leaves: Leaves = never,
) -> Training:
    """The loop in this process, or a GAN's coordinator: its halves are in this process too, or in the session's Ray.

    The loop is stopped by Left where it `leaves`.
    """
    if workers.coordinated:
        return coordinator_of(recipe, splits, run, workers, session)
    from cluster.training.loop import Loop

    device = local_device(workers.use_gpu)
    return Loop(recipe, LocalContext(run=run, splits=splits, device=device, leaves=leaves))


def coordinator_of(
    recipe: Recipe, splits: Splits, run: Folder, workers: Workers, session: RaySession | None
) -> "Coordinator":
    """The coordinator of a GAN's halves, which are in this process, or in Ray actors."""
    from cluster.adversarial.coordinator import Coordinator
    from cluster.adversarial.features import open_features
    from cluster.adversarial.players import LocalPlayers, Players

    data, device = splits.stored(), local_device(workers.use_gpu and session is None)
    start: Callable[[], Players] = partial(LocalPlayers, recipe, splits, device=device)
    if session is not None:
        from cluster.adversarial.actor_players import ActorPlayers

        world: dict[str, Any] = {"pairs": workers.replicas, "bundle": workers.bundle, "session": session}
        start = partial(ActorPlayers, recipe, splits, **world)
    return Coordinator(
        recipe,
        data,
        run=run,
        features=open_features(data, device=device),
        start=start,
        replicas=max(1, workers.replicas),
    )
