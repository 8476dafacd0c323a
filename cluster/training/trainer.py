"""train: one recipe from data to result, in this process or on Ray."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.data.prepare import prepared
from cluster.data.shards import DataSet
from cluster.errors import RunFailed
from cluster.runtime import RaySession, Workers, ray_session, refuse_unplaceable, warn_about_cores
from cluster.training.context import LocalContext, Splits, open_splits
from cluster.training.recipe import Recipe, load_recipe
from cluster.training.run_directory import RunDirectory, environment, jsonable, read_metrics
from nn_models.errors import UserError

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, Any]], None]  # called with each line of metrics


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `metrics` are named as in result.json (`test/accuracy`); `run` is its directory."""

    status: str  # finished; a run that fails or is stopped raises, and result.json says so
    metrics: dict[str, float]
    run: str
    result: dict[str, Any]

    def load_model(self) -> "nn.Module":
        """The best weights, in evaluation mode on the CPU."""
        from cluster.training.checkpoints import restore_model

        run = RunDirectory(self.run)
        return restore_model(run.folder, run.recipe())[0]


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
    existing Ray cluster's; without one Ray is started on this machine. `listener` is called with each line of metrics.

    Raises UserError where something must be changed first, RunFailed (result.json says `failed` then) where the run
    could not finish. KeyboardInterrupt leaves result.json with the status `stopped`.
    """
    began = time.time()
    recipe = load_recipe(recipe, overrides).model_copy(update={"sweep": None})  # of `manta sweep` only
    directory = RunDirectory(new_run_name(recipe) if run is None else run)
    with ExitStack() as stack:
        if resume and directory.exists():
            stack.enter_context(directory.folder.claimed())
            _refuse_other_recipe(recipe, directory)
            done = directory.result()
            if done and done["status"] == "finished":
                return Outcome("finished", done["metrics"], str(directory), done)
        elif resume:
            raise UserError(f"--resume: {directory} holds no run to continue; check --run, or leave out --resume")
        else:
            directory.refuse_occupied()  # before minutes of work; `begin` claims it once nothing else can be wrong
        workers = workers_of(recipe, num_workers, use_gpu, alone=address is None)
        if address and not workers.most:
            raise UserError("--address: training with --workers 0 uses no cluster; give --workers 1 or more")
        data = prepared(recipe.data)
        recipe.check(data.manifest)
        splits = open_splits(data, window=recipe.data.shuffle_window)
        refuse_what_cannot_start(recipe, splits, workers)

        device = device_name(use_gpu)
        facts = environment(seed=recipe.train.seed, num_workers=num_workers, use_gpu=use_gpu, device=device)
        session = None
        if workers.most:
            cpus = workers.most * workers.cpus
            session = stack.enter_context(ray_session(address=address, cpus=cpus, verbose=verbose))
            if session.embedded:
                warn_about_cores(workers)
            refuse_unplaceable(session.ray, workers)
        if resume:
            directory.write_start(recipe, facts)
        else:
            directory.begin(recipe, facts)
            stack.enter_context(directory.folder.claimed())
        result = run_here(
            recipe, data, splits, directory, workers, session, num_workers=num_workers, listener=listener, began=began
        )
    return Outcome(result["status"], result["metrics"], str(directory), result)


def run_here(
    recipe: Recipe,
    data: DataSet,
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
    status: dict[str, Any] = {"status": "stopped"}
    with ExitStack() as stack:
        if listener:
            stack.enter_context(_Tail(directory, listener))
        try:
            status = {"status": "finished", **_fit(recipe, data, splits, directory, workers, session)}
        except Exception as error:
            status = {"status": "failed", "error": str(error)}
            if isinstance(error, (UserError, RunFailed)):
                raise
            raise RunFailed(f"{type(error).__name__}: {error}") from error
        finally:
            result = result_of(status, directory, began)
            result["num_workers"] = num_workers
            directory.write_result(result)
    return result


def _fit(
    recipe: Recipe,
    data: DataSet,
    splits: Splits,
    directory: RunDirectory,
    workers: Workers,
    session: RaySession | None,
) -> dict[str, Any]:
    """What the training returns, run in this process or in Ray workers."""
    if recipe.adversarial is not None:
        return _fit_halves(recipe, data, splits, directory, workers, session)
    if session is not None:
        from cluster.training.ray_train import train_on_ray

        return train_on_ray(recipe, splits, run=directory.folder, workers=workers, session=session)
    from cluster.training.loop import fit

    context = LocalContext(run=directory.folder, splits=splits, device=local_device(workers.use_gpu))
    return {**fit(recipe, context=context), "restarts": 0}


def _fit_halves(
    recipe: Recipe,
    data: DataSet,
    splits: Splits,
    directory: RunDirectory,
    workers: Workers,
    session: RaySession | None,
) -> dict[str, Any]:
    """The same for a GAN: its halves in this process, or in Ray actors."""
    from cluster.adversarial.coordinator import Coordinator
    from cluster.adversarial.features import open_features
    from cluster.adversarial.players import LocalPlayers, Players

    device = local_device(workers.use_gpu and session is None)
    start: Callable[[], Players] = partial(LocalPlayers, recipe, splits, device=device)
    if session is not None:
        from cluster.adversarial.actors import ActorPlayers

        tables = session.references(splits.tables)
        world: dict[str, Any] = {"pairs": workers.pairs, "bundle": workers.bundle, "session": session}
        start = partial(ActorPlayers, recipe, splits, tables, **world)
    coordinator = Coordinator(
        recipe,
        data,
        run=directory.folder,
        features=open_features(data, device=device),
        start=start,
        replicas=max(1, workers.pairs),
    )
    return coordinator.run()


def new_run_name(recipe: Recipe) -> str:
    """runs/<recipe>-<date>-<time>, with a number behind it where that is taken."""
    name = f"runs/{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    taken = (f"{name}-{number}" if number else name for number in range(1000))
    return next(candidate for candidate in taken if not Path(candidate).exists())


def result_of(status: dict[str, Any], directory: RunDirectory, began: float) -> dict[str, Any]:
    """What result.json says of a run; of one that did not finish, the last metrics that were written."""
    first = status.pop("first_step_at", None)
    if status["status"] != "finished":
        lines = read_metrics(directory)
        last = {line["split"]: line for line in lines}
        beside = {"step", "epoch", "split", "time_s"}
        status["metrics"] = {
            f"{split}/{name}": value
            for split, line in last.items()
            for name, value in line.items()
            if name not in beside and isinstance(value, float)
        }
        status["steps"] = lines[-1]["step"] if lines else 0
    now = time.time()
    status["metrics"] = jsonable(status["metrics"])
    times = {"wall_s": round(now - began, 3), "time_to_first_step_s": round(first - began, 3) if first else None}
    return {**status, **times}


def workers_of(recipe: Recipe, num_workers: int | tuple[int, int], use_gpu: bool, *, alone: bool) -> Workers:
    """The Ray workers, or GAN halves, of a run. Raises UserError where there cannot be so many.

    Those of a run that has this machine to itself, `alone`, share all its cores, unless the recipe says otherwise.
    """
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    halves = recipe.adversarial is not None
    if halves:
        if least != most:
            raise UserError(f"--workers: {least}-{most}: the pairs of a GAN's halves cannot change in number; give one")
        least = most = 2 * most
    cores = os.cpu_count() or 1
    share = max(1, cores // most) if most and alone else 1
    return Workers(least, most, recipe.train.cpus_per_worker or share, use_gpu, halves)


def _refuse_other_recipe(recipe: Recipe, directory: RunDirectory) -> None:
    """A run goes on with the recipe that it began with."""
    began_with = directory.recipe()
    if began_with.sweep is not None:
        raise UserError(f"--resume: {directory} is a sweep, not a run; continue it with manta sweep … --resume")
    if recipe != began_with:
        old, new = began_with.model_dump(), recipe.model_dump()
        changed = [f"{a}.{b}" for a in new for b in _differences(old[a], new[a])]
        raise UserError(
            f"--resume: {directory} began with another recipe ({', '.join(changed) or 'its name'} differ); continue it "
            f"with {directory}/recipe.yaml, or start a new run"
        )


def _differences(old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return []


def refuse_what_cannot_start(recipe: Recipe, splits: Splits, workers: Workers) -> None:
    """Send imaginary rows through the model, and see that GPU and ranks have what they need."""
    from cluster.data.loader import training_order
    from cluster.training.summary import summarise

    train, ranks = recipe.train, max(1, workers.pairs if workers.halves else workers.most)
    summary = summarise(recipe, splits.manifest)
    if workers.use_gpu and not workers.most:
        local_device(True)
    if ranks > train.global_batch_size:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} rows cannot be shared by {ranks} workers; raise it, "
            "or use fewer workers"
        )
    order = training_order(
        splits.manifest,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        window=recipe.data.shuffle_window,
    )
    order.rows(0, 0, 0, ranks)  # a streamed set has lanes for so many ranks only
    if recipe.schedule.warmup_steps >= summary.num_steps:
        logger.warning("the learning rate is still warming up when the run ends, after %d steps", summary.num_steps)
    fewest = order.num_rows // order.num_steps // ranks // train.accumulation
    if fewest < 2 and any(layer.kind == "BatchNorm1d" for layer in summary.layers):
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} leaves some of {ranks} workers a single row at once, "
            "which batch normalisation cannot learn from; raise it, or lower train.accumulation or the workers"
        )


def local_device(use_gpu: bool) -> Any:
    """The torch device of a run in this process. Raises UserError where a GPU is asked for and there is none."""
    import torch

    if use_gpu and not torch.cuda.is_available():
        raise UserError("--gpu: torch finds no GPU on this machine; leave it out, or check the driver with nvidia-smi")
    return torch.device("cuda" if use_gpu else "cpu")


def device_name(use_gpu: bool) -> str:
    """The device that this machine's processes train on, as environment.json has it."""
    import torch

    return torch.cuda.get_device_name() if use_gpu and torch.cuda.is_available() else "cpu"


class _Tail:
    """Hands each new line of metrics.jsonl to the listener, wherever the loop runs."""

    def __init__(self, directory: RunDirectory, listener: Listener) -> None:
        self._directory, self._listener = directory, listener
        self._seen = read_metrics(directory)  # of a run that is continued
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()  # what is left

    def _follow(self) -> None:
        while not self._stop.wait(0.5 if self._directory.folder.local else 5.0):
            self._read()

    def _read(self) -> None:
        lines = read_metrics(self._directory)
        # a restart drops the lines that came after its checkpoint, and writes them anew
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._seen, lines, strict=False)))
        for line in lines[same:]:
            self._listener(line)
        self._seen = lines
