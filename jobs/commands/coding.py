"""`manta encode`, `detect`: what a trained autoencoder is used for."""

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.app import app, import_from_here
from jobs.commands.options import GpuOption, JsonOption, RunArgument
from nn_models.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from cluster.data.sources.base import DataSpec

DataArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[DATA]",
        help="A file of rows (Parquet, CSV, TSV, JSON lines) with the columns of the run's data, a source's name, a "
        "prepared folder, or YAML: '{kind: parquet, …}'; by default the run's own data.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(help="train, validation or test, of data with splits.", show_default=False)
]
LabelOption = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of a file with the labels.")]


@app.command()
def encode(
    run: RunArgument,
    data: DataArgument = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="File to write, or to replace, whatever the rows are many.")
    ] = "codes.parquet",
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
    tables = encode_rows(run, data=_data(data), splits=_splits(split), label=label, device=local_device(gpu))
    path, rows = stream_rows(tables, place, out=out)
    print(json.dumps({"path": path, "rows": rows}) if as_json else path)


def _data(given: str | None) -> "DataSpec | str | None":
    """A file of rows by its name, or a data section."""
    from pathlib import PurePosixPath

    from cluster.data.tabular import ENDINGS
    from cluster.recipe.loading import parse_data

    if given is None:
        return None
    if PurePosixPath(given).suffix.lower() in ENDINGS and not given.lstrip().startswith("{"):
        return given
    return parse_data(given, name="DATA").resolved(os.getcwd())


def _splits(split: str | None) -> tuple[str, ...]:
    from cluster.data.manifest import SPLITS

    if split is None:
        return ()
    if split not in SPLITS:
        raise UserError("--split", f"{split!r} is no split", did_you_mean(split, SPLITS))
    return (split,)
