"""What `manta sweep` does: run the sweep with its progress, then say what came of it."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from cluster.recipe.loading import load_recipe
from cluster.recipe.recipe import Recipe
from cluster.runs.admission import workers_of
from cluster.runtime.existing import RAY_ADDRESS
from cluster.submission.told import telling
from cluster.training.run_directory import new_place
from cluster.tuning.budget import needs_of
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from cluster.tuning.outcome import SweepOutcome
from cluster.tuning.sweep import again
from cluster.tuning.sweep import sweep as run_sweep_of
from jobs.commands.printing import print_outcome
from jobs.commands.sweep_progress import SweepProgress, counts, first_line
from nn_models.errors import UserError

MAX_REASONS = 3


class Interrupted(Exception):
    """The sweep was interrupted; the message says how to go on."""


def run_sweep(
    recipe: str,
    *,
    overrides: Mapping[str, Any],
    run: str | None,
    workers: int,
    gpu: bool,
    address: str | None,
    resume: bool,
    retry_failed: bool,
    concurrency: int | None,
    fuse: str,
    verbose: bool,
) -> SweepOutcome:
    """Run a sweep and show how it goes. Raises UserError, and Interrupted with the line that resumes it."""
    resolved = load_recipe(recipe, overrides)
    if gpu and not address and not os.environ.get(RAY_ADDRESS) and resolved.sweep:
        _refuse_missing_gpus(resolved, workers)
    try:
        with ExitStack() as stack, SweepProgress(resolved.name) as progress:
            run = run or stack.enter_context(new_place("sweeps", resolved))
            stack.enter_context(telling("sweep", run, name=resolved.name))
            return run_sweep_of(
                resolved,
                num_workers=workers,
                use_gpu=gpu,
                run=run,
                address=address,
                resume=resume,
                retry_failed=retry_failed,
                concurrency=concurrency,
                listener=progress,
                fuse=fuse,
                verbose=verbose,
            )
    except KeyboardInterrupt:
        if not run or not SweepDirectory(run).exists():
            raise Interrupted("interrupted before the sweep began") from None
        asked: dict[str, Any] = {"num_workers": workers, "address": address, "concurrency": concurrency, "fuse": fuse}
        raise Interrupted(f"interrupted; to go on: {again(run, use_gpu=gpu, **asked)}") from None


def _refuse_missing_gpus(recipe: Recipe, workers: int) -> None:
    """Raise UserError before Ray is started where this machine has fewer GPUs than one trial holds."""
    import torch

    needs = needs_of(workers_of(recipe, workers, True, alone=False))
    wanted, have = sum(bundle.get("GPU", 0) for bundle in needs.all), torch.cuda.device_count()
    if wanted > have:
        raise UserError(
            "--gpu",
            f"a trial needs {needs.text}, and this machine has {have or 'no'} GPU{'s' * (have > 1)}",
            "leave it out, ask for fewer workers, or give a cluster's --address",
        )


def print_sweep(outcome: SweepOutcome, report: str | None, *, as_json: bool) -> None:
    """The best trial and where its things are, and what became of the others."""
    if as_json:
        print(json.dumps({"run": outcome.run, "report": report, **outcome.result}))
        return
    facts: dict[str, object] = {}
    if outcome.best_trial:
        best, metric = outcome.best_trial, outcome.result["metric"]
        facts |= {"best trial": best.index, metric: f"{best.value:.6g}"}
        facts |= {path: _text(value) for path, value in best.overrides.items()}
        tested = {name: value for name, value in best.metrics.items() if name.startswith("test/")}
        facts |= {name: f"{value:.4f}" for name, value in tested.items()}
        folder = SweepDirectory(outcome.run).folder
        facts["best recipe"] = folder / "best.yaml"
        facts["model"] = folder / "model" if folder.exists("model") else None
    facts["trials"] = f"{counts(outcome.trials)}; {outcome.result['trials_per_hour']:,.0f} an hour"
    print_outcome({}, {**facts, "sweep": outcome.run, "report": report})
    for line in reasons(outcome.trials):
        print(line, file=sys.stderr)


def reasons(records: Sequence[TrialRecord]) -> list[str]:
    """Why trials failed or were refused: the commonest reasons first."""
    lines = []
    for status in ("failed", "invalid"):
        trials = defaultdict(list)
        for record in records:
            if record.status == status:
                trials[first_line(record.error or "no reason is known")].append(record.index)
        for reason, indices in sorted(trials.items(), key=lambda item: -len(item[1]))[:MAX_REASONS]:
            more = ", …" if len(indices) > 5 else ""
            numbers = ", ".join(map(str, indices[:5]))
            lines.append(f"{status}: trial{'s' * (len(indices) > 1)} {numbers}{more}: {reason}")
        if len(trials) > MAX_REASONS:
            lines.append(f"{status}: {len(trials) - MAX_REASONS} more reasons; trials.csv has them all")
    return lines


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value
