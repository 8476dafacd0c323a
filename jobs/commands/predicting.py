"""`manta predict`: what a run's model says of rows, of files, of a text."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.app import INTERRUPTED, app, complain, import_from_here
from jobs.commands.given import LabelOption, SplitOption, data_of, splits_of
from jobs.commands.options import GpuOption, JsonOption, RunArgument, VerboseOption
from nn_models.errors import UserError

if TYPE_CHECKING:
    from cluster.inference.predictions import Prediction

SHOWN = 3  # of the likeliest classes, in a line for people


@app.command()
def predict(
    run: RunArgument,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="An image, a folder of images, a file of rows (Parquet, CSV, TSV, JSON lines) or of texts (a .txt, a "
            "row a line), - for JSON lines on standard input, a source's name, a prepared folder, or YAML: "
            "'{kind: parquet, …}'; by default the test split of the run's own data.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="A text, or a tree in brackets, '((It works) .)'; with a parser a sentence."),
    ] = None,
    parser: Annotated[
        str | None, typer.Option(metavar="RUN", help="The run of a parser, which finds the sentence's tree.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File to write: predictions.parquet or .jsonl; else rows are printed."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it is there already.")] = False,
    split: SplitOption = None,
    label: LabelOption = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Read no labels, and tell no figures.")] = False,
    resize: Annotated[bool, typer.Option("--resize", help="Resize images of another size than the model's.")] = False,
    explained: Annotated[
        str | None,
        typer.Option("--explain", metavar="FILE", help="A PNG file: the first images, and what their classes go by."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the likeliest classes are named of each row.")] = 5,
    workers: Annotated[
        str, typer.Option(help="Ray workers, or MIN-MAX; what they have done is kept, to go on from after a kill.")
    ] = "0",
    gpu: GpuOption = False,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster, HOST:PORT.")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Predict classes or numbers of rows by a run's best model, from RUN/model alone.

    A row for each: its number or file, the prediction, its probability, the likeliest classes. Where rows have labels,
    their figures are told at the end, as `manta evaluate` has them. Many rows are predicted by Ray workers, in parts
    that are kept in FILE.parts until all are done: the same command goes on where one was cut short.
    """
    import_from_here()
    if text is not None:
        given = {"DATA": data, "--split": split, "--label": label, "--out": out, "--explain": explained}
        for option, value in given.items():
            if value is not None:
                raise UserError(option, "a text is given already, with --text", "leave one of them out")
        _predict_text(run, text, parser=parser, top=top, gpu=gpu, as_json=as_json)
        return
    if parser is not None:
        raise UserError("--parser", "it finds the tree of one sentence", "give that with --text")
    from cluster.runtime import configure_ray, local_device, parse_workers

    configure_ray()
    from cluster.inference.predictions import Prediction
    from jobs.commands.explaining import explained_place, write_explained
    from jobs.commands.printing import print_outcome
    from jobs.commands.rows import predictions_place, stream_rows

    least, most = parse_workers(workers)
    if out is None and (most or address or (overwrite and explained is None)):
        option = "--workers" if most else "--address" if address else "--overwrite"
        raise UserError(option, "there is no file to write", "name one with --out")
    if address and not most:
        raise UserError("--address", "this process predicts alone", "say how many workers there shall be: --workers")
    place = None if out is None else predictions_place(out, overwrite=overwrite)
    prediction = Prediction(
        run,
        data_of(data),
        splits=splits_of(split),
        label=label,
        labelled=not unlabelled,
        resize=resize,
        top=top,
        device=local_device(gpu and not most),
    )
    picture = explained_place(explained, prediction, overwrite=overwrite) if explained else None
    if place is None:
        _print(prediction, as_json=as_json)
        if picture is not None:
            print(write_explained(prediction, picture, out=str(explained)), file=sys.stderr)
        return
    if most:
        from cluster.inference.parted import PartedPrediction

        parted = PartedPrediction(prediction, place[0] / f"{place[1]}.parts", overwrite=overwrite)
        num_workers = least if least == most else (least, most)
        try:
            parted.compute(num_workers, use_gpu=gpu, address=address, verbose=verbose)
        except KeyboardInterrupt:
            raise typer.Exit(complain("interrupted; the same command goes on from there", INTERRUPTED)) from None
        path, rows = stream_rows(parted.tables(), place, out=str(out))
        parted.delete()
    else:
        path, rows = stream_rows(prediction.tables(), place, out=str(out))
    metrics = prediction.metrics()
    seen = {} if picture is None else {"explained": write_explained(prediction, picture, out=str(explained))}
    if as_json:
        print(json.dumps({"path": path, "rows": rows, "metrics": metrics, **seen}))
    else:
        print_outcome(metrics, {"rows": rows, "predictions": path, **seen})


def _print(prediction: "Prediction", *, as_json: bool) -> None:
    """The rows as they come, and then their figures."""
    from jobs.commands.printing import print_outcome
    from jobs.commands.rows import plain_rows

    found, rows = list[dict[str, Any]](), 0
    for table in prediction.tables():
        rows += table.num_rows
        if as_json:
            found += plain_rows(table)
            continue
        for row in plain_rows(table):
            print(_line(row))
        sys.stdout.flush()  # whoever writes to standard input may wait for it
    metrics = prediction.metrics()
    if as_json:
        print(json.dumps({"rows": found, "metrics": metrics}))
    elif metrics:
        print(file=sys.stderr)
        print_outcome(metrics, {"rows": rows}, file=sys.stderr)


def _predict_text(run: str, text: str, *, parser: str | None, top: int, gpu: bool, as_json: bool) -> None:
    from cluster.inference.predict import PredictedTree, predict_text
    from cluster.runtime import local_device
    from jobs.commands.trees import tree_json, tree_lines

    found = predict_text(run, text, parser=parser, top=top, device=local_device(gpu))
    if isinstance(found, PredictedTree):
        if as_json:
            print(json.dumps(tree_json(found)))
            return
        for line in tree_lines(found):
            print(line)
        return
    (row,) = found.to_pylist()
    del row["row"]
    print(json.dumps(row) if as_json else _line(row))


def _line(row: dict[str, Any]) -> str:
    """A row for people: which it is, what is said of it, and what else it might be."""
    which = [str(row[name]) for name in ("split", "file", "row") if row.get(name) is not None]
    which = which[:-1] if "file" in row else which
    said, sure = row["prediction"], row.get("probability")
    if isinstance(said, list):
        told = " ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in said)
    else:
        told = f"{said:.6g}" if isinstance(said, float) else _shown(said)
    parts = [" ".join(which), told]
    if isinstance(sure, float):
        parts.append(f"{100 * sure:.1f} %")
        others = zip(row.get("top", [])[1:SHOWN], row.get("top_probability", [])[1:], strict=False)
        parts.append(", ".join(f"{_shown(name)} {100 * likely:.1f} %" for name, likely in others))
    if (true := row.get("label")) is not None and true != said:
        parts.append(f"(it is {true})")
    return "  ".join(filter(None, parts))


def _shown(said: object) -> str:
    """A class by its name, which may be a blank."""
    return repr(said) if not str(said).strip() else str(said)
