"""`manta encode`, `detect`: what a trained autoencoder is used for."""

import json
import math
from typing import Annotated

import typer

from jobs.commands.app import app, import_from_here
from jobs.commands.given import DataArgument, LabelOption, SplitOption, data_of, splits_of
from jobs.commands.options import GpuOption, JsonOption, RunArgument
from nn_models.errors import UserError


@app.command()
def encode(
    run: RunArgument,
    data: DataArgument = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="File to write, or to replace.")] = "codes.parquet",
    split: SplitOption = None,
    label: LabelOption = None,
    gpu: GpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the codes of rows, by a run's autoencoder, from RUN/model alone: split, row, label, code.

    Rows are read, coded and written piece by piece, so that memory does not grow with their number.
    """
    from cluster.inference.encode import encode as encode_rows
    from cluster.runtime import local_device
    from jobs.commands.rows import parquet_place, stream_rows

    import_from_here()
    place = parquet_place(out)
    tables = encode_rows(run, data=data_of(data), splits=splits_of(split), label=label, device=local_device(gpu))
    path, rows = stream_rows(tables, place, out=out)
    print(json.dumps({"path": path, "rows": rows}) if as_json else path)


@app.command()
def detect(
    run: RunArgument,
    data: DataArgument = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="File to write, or to replace: scores.parquet, a row a row.")
    ] = None,
    anomaly: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="The label of anomalies, to count them by; repeatable. By default those that training had no row of.",
        ),
    ] = None,
    label: LabelOption = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of normal rows that may be taken for anomalies, by default 0.05."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, help="The error above which a row is an anomaly, in the place of a rate.")
    ] = None,
    split: SplitOption = None,
    gpu: GpuOption = False,
    as_json: JsonOption = False,
) -> None:
    """Detect anomalies: rows that a run's autoencoder gives again worse than its normal validation rows.

    Of labelled rows it says precision, recall, AUROC and average precision; by default of the run's test split.
    """
    from cluster.inference.detect import Detector
    from cluster.runtime import local_device
    from jobs.commands.detecting import print_found
    from jobs.commands.rows import parquet_place, stream_rows

    import_from_here()
    if rate is not None and threshold is not None:
        raise UserError("--rate", "a threshold is given, which needs none", "leave one of them out")
    if threshold is not None and not math.isfinite(threshold):
        raise UserError("--threshold", f"{threshold} is no error of rows", "give a number from 0 on")
    place = None if out is None else parquet_place(out)
    detector = Detector(run, anomaly=anomaly or (), rate=rate, given=threshold, device=local_device(gpu))
    detection = detector.detect(data_of(data), splits=splits_of(split), label=label)
    path = None
    if place is not None:
        path, _ = stream_rows(detection.tables(), place, out=str(out))
    else:
        for _ in detection.tables():
            pass
    found = detection.found()
    print(json.dumps({"path": path, **found})) if as_json else print_found(found, path)
