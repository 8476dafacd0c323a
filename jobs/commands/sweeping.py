"""`manta sweep`."""

from typing import Annotated

import typer

from jobs.commands.app import FAILED, INTERRUPTED, app, complain, import_from_here
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
def sweep(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run: Annotated[str | None, typer.Option(help="Directory or URI to write; by default a new one in sweeps/.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers of each trial; of a GAN, pairs of halves.")] = 1,
    gpu: GpuOption = False,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster, HOST:PORT.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in --run.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run failed trials again.")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many trials at once; by default all that fit.")
    ] = None,
    fuse: Annotated[
        str, typer.Option(metavar="auto|off|N", help="Train trials that allow it as one batched model, N at most.")
    ] = "auto",
    track: TrackOption = None,
    as_json: JsonOption = False,
    report: Annotated[bool, typer.Option(help="Write SWEEP/report.html at the end.")] = True,
    verbose: VerboseOption = False,
) -> None:
    """Run the trials that a recipe's section sweep describes, and find the best.

    With --track each trial is a run of its own there, once the sweep has ended.
    """
    from cluster.runs.tracking.tracking import refuse_missing
    from jobs.commands.sweep_outcome import Interrupted, print_sweep, run_sweep

    import_from_here()
    if resume and run is None:
        raise UserError("--resume", "say which sweep to continue with --run DIR")
    if retry_failed and not resume:
        raise UserError(
            "--retry-failed", "there are failed trials only in a sweep that goes on", "add --resume --run DIR"
        )
    refuse_missing(track or ())
    try:
        outcome = run_sweep(
            recipe,
            overrides=overrides(set_),
            run=run,
            workers=workers,
            gpu=gpu,
            address=address,
            resume=resume,
            retry_failed=retry_failed,
            concurrency=concurrency,
            fuse=fuse,
            verbose=verbose,
        )
    except Interrupted as interrupted:
        raise typer.Exit(complain(str(interrupted), INTERRUPTED)) from None
    written = None
    if report:
        from jobs.report import write_report

        written = write_report(outcome.run)
    if track:
        from cluster.tuning.ledger import SweepDirectory
        from cluster.tuning.tracked import track_trials

        track_trials(track, SweepDirectory(outcome.run))
    print_sweep(outcome, written, as_json=as_json)
    if outcome.best_trial is None:
        raise typer.Exit(complain("no trial came to a value; the reasons are above and in trials.csv", FAILED))
