"""`manta train`."""

import json
from contextlib import ExitStack
from typing import Annotated

import typer

from jobs.commands.app import INTERRUPTED, app, complain, import_from_here
from jobs.commands.options import (
    GpuOption,
    JsonOption,
    RecipeArgument,
    SetOption,
    TrackOption,
    VerboseOption,
    overrides,
)
from nn_models.errors import UserError


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run: Annotated[str | None, typer.Option(help="Directory or URI to write; by default a new one in runs/.")] = None,
    workers: Annotated[str, typer.Option(help="Ray workers: 0 trains in this process; MIN-MAX is elastic.")] = "0",
    gpu: GpuOption = False,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster, HOST:PORT.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run.")] = False,
    track: TrackOption = None,
    as_json: JsonOption = False,
    report: Annotated[bool, typer.Option(help="Write RUN/report.html at the end.")] = True,
    verbose: VerboseOption = False,
) -> None:
    """Train a recipe."""
    from cluster.runtime import configure_ray, parse_workers
    from jobs.commands.printing import print_outcome

    import_from_here()
    least, most = parse_workers(workers)
    num_workers = least if least == most else (least, most)
    configure_ray()
    from cluster.recipe.loading import load_recipe
    from cluster.runs.tail import heard_by
    from cluster.runs.tracking.tracking import Tracking, tracked_before
    from cluster.runs.train import again
    from cluster.runs.train import train as run_training
    from cluster.submission.told import telling
    from cluster.training.run_directory import RunDirectory, new_place
    from jobs.commands.progress import Progress

    resolved = load_recipe(recipe, overrides(set_))
    if resume and run is None:
        raise UserError("--resume", "say which run to continue with --run DIR")
    written = None
    with ExitStack() as to_the_end:
        try:
            with (
                ExitStack() as stack,
                Progress(resolved.name, epochs=resolved.train.epochs, recipe=resolved) as progress,
            ):
                run = stack.enter_context(new_place("runs", resolved)) if run is None else run
                trackers = track or (tracked_before(run) if resume else ())  # what goes on is tracked as it was
                tracked = to_the_end.enter_context(Tracking(trackers, resolved, run))
                stack.enter_context(telling("train", run, name=resolved.name))
                outcome = run_training(
                    resolved,
                    num_workers=num_workers,
                    use_gpu=gpu,
                    run=run,
                    address=address,
                    resume=resume,
                    listener=heard_by(progress, tracked),
                    verbose=verbose,
                )
        except KeyboardInterrupt:
            message = "interrupted before the run began"
            if run is not None and RunDirectory(run).exists():
                line = again(run, num_workers=num_workers, use_gpu=gpu, address=address)
                message = f"interrupted; to go on: {line}"
            raise typer.Exit(complain(message, INTERRUPTED)) from None
        if report:
            from jobs.report import write_report

            written = write_report(outcome.run)
    if as_json:
        print(json.dumps({"run": outcome.run, **outcome.result}))
        return
    rollbacks = outcome.result.get("rollbacks") or []
    best = outcome.result.get("best") or {}
    facts = {
        # of an earlier version's run the figures are not all of these weights
        "weights of": f"epoch {best['epoch']} of {outcome.result['epochs']}" if "metrics" in best else None,
        "rollbacks": f"{len(rollbacks)}, the last at step {rollbacks[-1]['step']}" if rollbacks else None,
        "ended early": outcome.result.get("ended"),
        "run": outcome.run,
        "report": written,
        **tracked.where,
    }
    print_outcome(outcome.metrics, facts)
