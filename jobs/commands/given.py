"""Which rows a command is to use a model on, as the command line says it."""

import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from nn_models.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from cluster.data.sources.base import DataSpec

DataArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[DATA]",
        help="A file of rows (Parquet, CSV, TSV, JSON lines) with the columns of the run's data, an image or a folder "
        "of images, a source's name, a prepared folder, or YAML: '{kind: parquet, …}'; by default the run's own data.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(help="train, validation or test, of data with splits.", show_default=False)
]
LabelOption = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of a file with the labels.")]


def data_of(given: str | None) -> "DataSpec | str | None":
    """A file or a folder of files by its name, or a data section; None for the run's own data."""
    from cluster.data.manifest import MANIFEST
    from cluster.recipe.loading import parse_data
    from cluster.storage import Folder

    if given is None or given == "-":
        return given
    looks_like_files = bool(PurePosixPath(given).suffix) or "/" in given or os.path.exists(given)
    section = given.lstrip().startswith("{") or given in _sources() or not looks_like_files
    if section or Folder(given).exists(MANIFEST):
        return parse_data(given, name="DATA").resolved(os.getcwd())
    return given


def _sources() -> tuple[str, ...]:
    from cluster.data.sources.catalogue import AnyDataSpec

    union, *_ = get_args(AnyDataSpec)
    return tuple(spec.model_fields["kind"].default for spec in get_args(union))


def splits_of(split: str | None) -> tuple[str, ...]:
    """The split that is asked for; none for all."""
    from cluster.data.manifest import SPLITS

    if split is None:
        return ()
    if split not in SPLITS:
        raise UserError("--split", f"{split!r} is no split", did_you_mean(split, SPLITS))
    return (split,)
