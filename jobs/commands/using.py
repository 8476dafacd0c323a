"""`manta evaluate`, `generate`, `forecast`, `report`: what a trained run is used for."""

import json
import os
from typing import Annotated

import typer

from jobs.commands.app import app, import_from_here
from jobs.commands.options import (
    GpuOption,
    JsonOption,
    RunArgument,
)
from nn_models.errors import UserError

MOST_IMAGES = 10_000  # of one picture


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[
        str | None, typer.Option(help="Other data: a source's name, a prepared folder, or YAML: '{kind: parquet, …}'.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    gpu: GpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a run's best model, from RUN/model alone."""
    from cluster.data.manifest import SPLITS
    from cluster.inference.evaluate import evaluate_run
    from cluster.recipe.loading import parse_data
    from cluster.runtime import local_device
    from jobs.commands.printing import print_outcome
    from nn_models.errors import did_you_mean

    import_from_here()
    if split not in SPLITS:
        raise UserError("--split", f"{split!r} is no split", did_you_mean(split, SPLITS))
    source = None if data is None else parse_data(data).resolved(os.getcwd())
    result = evaluate_run(run, data=source, split=split, device=local_device(gpu))
    if as_json:
        print(json.dumps(result))
        return
    print_outcome(result["metrics"], {"rows": result["rows"]})


@app.command()
def generate(
    run: RunArgument,
    num: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Images to make, by default 64; of a text tokens, 500.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File to write, or to replace: samples.png; a text is printed without it."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Class to make, by name or number (conditional models); by default each in turn.")
    ] = None,
    between: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="ROW ROW", help="Two test rows to go between, by code (autoencoders); 16 steps.", min=0),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on with (language models).")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Below 1 likelier tokens, 0 always the likeliest (language models).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise: the same gives the same.")] = 0,
    gpu: GpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw images that a GAN or a variational autoencoder makes, or a language model's text.

    For pairs: given, made, true. An autoencoder also goes from one test row to another (--between). All comes from
    RUN/model alone. A text is printed token by token, as it is made.
    """
    from cluster.runtime import local_device
    from jobs.commands.generating import write_samples, write_text, writes

    import_from_here()
    device = local_device(gpu)
    if writes(run):
        if label is not None:
            raise UserError("--label", "a text has no label", "leave it out, or give the run of a conditional GAN")
        if between is not None:
            raise UserError("--between", "a text has no codes", "leave it out, or give the run of an autoencoder")
        num = 500 if num is None else num
        text = write_text(
            run, num=num, prompt=prompt or "", temperature=temperature, seed=seed, out=out, device=device, quiet=as_json
        )
        if as_json:
            print(json.dumps({"text": text, "num": num, "seed": seed, "path": out}))
        return
    for option, value in (("--prompt", prompt), ("--temperature", temperature)):
        if value is not None:
            raise UserError(option, "this run's model writes no text", "leave it out, or give a language model's run")
    num = (64 if between is None else 16) if num is None else num
    if num > MOST_IMAGES:
        raise UserError("--num", f"{num} images; at most {MOST_IMAGES:,} make one picture", "ask for fewer")
    out = "samples.png" if out is None else out
    path = write_samples(run, num=num, out=out, label=label, seed=seed, between=between, device=device)
    print(json.dumps({"path": path, "num": num, "seed": seed, "label": label}) if as_json else path)


@app.command()
def forecast(
    run: RunArgument,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="A file with the series to go on from; by default the run's own data."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="File to write, or to replace: forecast.csv or .parquet; else it is printed."
        ),
    ] = None,
    gpu: GpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Forecast what follows the end of a series, of each group, by a run's best model: from RUN/model alone.

    A row for each step and column: time, group (where there are some), step, column, value, in the file's units.
    """
    from cluster.inference.forecast import forecast as forecast_run
    from cluster.runtime import local_device
    from jobs.commands.rows import give_rows, plain_rows, rows_place

    import_from_here()
    place = rows_place(out)
    rows = forecast_run(run, data=data, device=local_device(gpu)).table()
    if not as_json:
        if path := give_rows(rows, place, out=out):
            print(path)
        return
    path = give_rows(rows, place, out=out) if place else None
    print(json.dumps({"path": path, "rows": plain_rows(rows)}))


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN|SWEEP", help="The directory of a run or a sweep.")],
) -> None:
    """Write report.html of a run or a sweep anew."""
    from jobs.report import write_report

    print(write_report(run))
