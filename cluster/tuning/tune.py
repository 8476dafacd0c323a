"""Ray Tune's side of a sweep: our searchers as its search algorithm, its schedulers, its loop over trials."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.errors import Lost
from cluster.recipe.sweep import SweepSpec
from cluster.runtime import configure_ray
from cluster.tuning.ledger import Status

# What a trial needs is in its run directory: Tune shall write no second account of it.
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_DELIM": "//",  # our metrics have a / in their names
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # KeyboardInterrupt must reach the caller
    "RAY_AIR_NEW_OUTPUT": "0",
}

TIDY_S = 5


def configure_tune() -> None:
    """Settle Tune's environment; must come before the first `import ray`."""
    configure_ray()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


configure_tune()

from ray import tune  # noqa: E402
from ray.tune.schedulers import (  # noqa: E402
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher  # noqa: E402

from cluster.tuning.messages import (  # noqa: E402
    CONFIG,
    EPOCH,
    ERROR,
    LEFT,
    MEMBERS,
    OUTCOME,
    Config,
    TrialConfig,
)

# (recipient's configuration, donor's, a number that differs each time) -> the recipient's new one
Mutate = Callable[[TrialConfig, TrialConfig, int], TrialConfig]
Next = Callable[[], Config | None]


class _Unsaved:
    """Tune pickles all it is given, to resume by itself. We never do, and a sweep holds data and locks."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Suggestions(_Unsaved, Searcher):
    """Tune asks it for trials; whoever made it says which, and is told how they went."""

    def __init__(self, next_trial: Next) -> None:
        super().__init__()
        self._next = next_trial

    def suggest(self, trial_id: str) -> Any:
        """See Searcher."""
        config = self._next()
        return Searcher.FINISHED if config is None else {CONFIG: config}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See Searcher: the Listening callback has been told already."""

    def save(self, checkpoint_path: str) -> None:
        """See Searcher: the sweep's directory has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """See Searcher."""


class Listening(_Unsaved, tune.Callback):
    """Hands on what Tune learns of each trial."""

    def __init__(
        self,
        *,
        on_start: Callable[[int, int], None],
        on_epoch: Callable[[int, Mapping[str, Any]], None],
        on_end: Callable[[int, Status, str | None], None],
        look: Callable[[], None],
        tidy: Callable[[], object] | None = None,
    ) -> None:
        """`look` is called again and again, and raises what ends the sweep; `tidy` every few seconds."""
        self.lost: Lost | None = None  # what ended the sweep
        self._look = self._noting(look)
        self._on_start, self._on_epoch = self._noting(on_start), self._noting(on_epoch)
        self._on_end = self._noting(on_end)
        self._tidy, self._tidy_at = tidy, 0.0

    def _noting(self, told: Callable[..., Any]) -> Callable[..., Any]:
        """Keep for the end of Tune's step what is raised as Lost: in between Tune logs it and goes on."""

        def noting(*what: Any) -> Any:
            try:
                return told(*what)
            except Lost as lost:
                self.lost = self.lost or lost
                return None

        return noting

    def asked(self, next_trial: Next) -> Next:
        """The same, of who says which trial is the next: there is none any more."""
        return self._noting(next_trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """See Callback."""
        self._look()
        if self.lost:
            raise self.lost
        if self._tidy and time.monotonic() >= self._tidy_at:
            self._tidy()
            self._tidy_at = time.monotonic() + TIDY_S

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback."""
        for index in _config(trial).indices:
            self._on_start(index, trial.num_failures)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Callback. A group of fused trials reports on each, and on those that have ended."""
        if MEMBERS not in result:
            self._on_epoch(_config(trial).index, result)
            return
        for index, metrics in result[MEMBERS].items():
            self._on_epoch(index, metrics)
        for index, (status, error) in result[LEFT].items():
            self._on_end(index, status, error)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback. What did not end by itself was stopped by the scheduler."""
        result = trial.last_result or {}
        if MEMBERS in result:  # each has been told of; where all have failed together, the result names none
            return
        for index in _config(trial).indices:
            self._on_end(index, result.get(OUTCOME, "pruned"), result.get(ERROR))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback. Called once the retries are used up."""
        text = Path(trial.error_file).read_text() if trial.error_file and Path(trial.error_file).exists() else ""
        lines = text.strip().splitlines() or ["its process died"]
        for index in _config(trial).indices:
            self._on_end(index, "failed", lines[-1])


def _config(trial: Any) -> Config:
    """Ours, of one of Tune's trials."""
    found: Config = trial.config[CONFIG]
    return found


class _Population(_Unsaved, PopulationBasedTraining):
    """Tune's population, whose values are mutated as the sweep's space says."""

    def __init__(self, mutate: Mutate, **options: Any) -> None:
        super().__init__(**options)
        self._mutate, self._draws = mutate, 0

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See TrialScheduler. Tune refuses all search algorithms here, as if they minded what is mutated later."""
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self._draws += 1
        return {CONFIG: self._mutate(trial.config[CONFIG], trial_to_clone.config[CONFIG], self._draws)}, {}


class _Median(MedianStoppingRule):
    """Tune's rule, which reads the metric in the last report of every trial: one that has failed has none there."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See TrialScheduler."""
        if self._metric in result:
            super().on_trial_complete(tune_controller, trial, result)


def scheduler_of(
    sweep: SweepSpec,
    epochs: int,
    *,
    metric: str,
    mode: str,
    past: Mapping[int, list[tuple[int, float]]],
    mutate: Mutate,
) -> TrialScheduler:
    """Tune's scheduler, for trials of at most so many epochs.

    `past` has (epoch, value) of the trials of a sweep that goes on, to be judged against.
    """
    common = {"time_attr": EPOCH, "metric": metric, "mode": mode}
    if sweep.scheduler == "asha":
        asha = ASHAScheduler(
            **common,
            max_t=epochs,
            grace_period=min(sweep.grace_epochs, epochs),
            reduction_factor=sweep.reduction_factor,
            stop_last_trials=False,
        )
        sign = 1 if mode == "max" else -1
        for index, results in past.items():
            for epoch, value in results:
                asha._brackets[0].on_result(SimpleNamespace(trial_id=f"past-{index}"), epoch, sign * value)
        return asha
    if sweep.scheduler == "median":
        median = _Median(**common, grace_period=sweep.grace_epochs, min_samples_required=3)
        for index, results in past.items():
            median._results[f"past-{index}"] = [{EPOCH: epoch, metric: value} for epoch, value in results]
        return median
    if sweep.scheduler == "pbt":
        return _Population(
            mutate,
            **common,
            perturbation_interval=sweep.perturb_every(epochs),
            custom_explore_fn=lambda config: config,  # see _get_new_config
            log_config=False,
            require_attrs=False,  # a metric that is no finite number is left out
        )
    return FIFOScheduler()


def run_trials(
    trainable: type[tune.Trainable],
    world: Any,
    *,
    next_trial: Next,
    num_trials: int,
    scheduler: TrialScheduler | None,
    bundles: list[dict[str, float]],
    concurrency: int,
    reuse: bool,
    max_failures: int,
    listening: Listening,
    folder: Path | None = None,
) -> None:
    """All trials, `concurrency` at once; each holds `bundles`. Returns once all have ended.

    Tune's notes are in `folder`, or where temporary files are.
    """
    placed = tune.with_resources(
        tune.with_parameters(trainable, world=world), tune.PlacementGroupFactory(bundles, strategy="PACK")
    )
    with tempfile.TemporaryDirectory(prefix="manta-", dir=folder, ignore_cleanup_errors=True) as notes:
        tuner = tune.Tuner(
            placed,
            tune_config=tune.TuneConfig(
                search_alg=Suggestions(listening.asked(next_trial)),
                scheduler=scheduler,
                num_samples=num_trials,
                # a population takes turns: all of it must be there, and what fits at once follows from what each holds
                max_concurrent_trials=None if isinstance(scheduler, _Population) else concurrency,
                reuse_actors=reuse,
                trial_dirname_creator=lambda trial: f"{_config(trial).index:04d}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=notes,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run keeps its own
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[listening],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception:
            if listening.lost is None:
                raise
        if listening.lost:
            raise listening.lost
