"""`manta export`: a run's best model as a file that others compute."""

import json
from typing import Annotated, Any

import typer

from jobs.commands.app import app, import_from_here
from jobs.commands.options import JsonOption, RunArgument
from nn_models.errors import UserError, did_you_mean


@app.command()
def export(
    run: RunArgument,
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="onnx, torch-export, torchscript or safetensors-hub.")
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="File to write: .onnx, .pt2 or .pt; a folder for a hub.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a run's best model for use without manta: from RUN/model alone.

    A file takes numbers as files hold them, pixels as bytes, any number of rows, and gives the classes' numbers and
    probabilities, or numbers in their units; names of classes stand in it. Before it is written, its numbers are
    compared with PyTorch's. safetensors-hub makes a folder to share: weights, recipe and a model card.
    """
    from cluster.inference.export.exporting import export as exported
    from cluster.inference.export.formats import FORMATS, HUB
    from cluster.inference.export.hub import NAMES, hub_files, write_files
    from jobs.commands.places import new_folder, place_of, refuse_existing, write_whole

    import_from_here()
    if format_ == HUB:
        with new_folder(out, overwrite=overwrite, holds=NAMES) as folder:
            files, difference = hub_files(run)
            write_files(folder, files)
        _tell({"path": out, "format": HUB, "difference": difference, "files": sorted(files)}, as_json)
        return
    if format_ not in FORMATS:
        raise UserError("--format", f"{format_!r} is no format", did_you_mean(format_, [*FORMATS, HUB]))
    format = FORMATS[format_]
    place = place_of(out, format.endings, what=format.what)
    refuse_existing(place, overwrite=overwrite)
    found = exported(run, format=format)
    path = write_whole(place, found.content, out=out)
    told = {"inputs": found.inputs, "outputs": found.outputs, "rows_compared": found.rows}
    _tell({"path": path, "format": format.name, "difference": found.difference, **told}, as_json)


def _tell(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    print(found["path"])
    for way in ("inputs", "outputs"):
        for port in found.get(way, ()):
            shape = ", ".join(map(str, port["shape"]))
            print(f"{way[:-1]:7} {port['name']}: {port['dtype']} ({shape}), {port['meaning']}")
    if "rows_compared" in found:
        print(f"largest difference from PyTorch on {found['rows_compared']} made rows: {found['difference']:.1e}")
    else:
        print(f"files   {', '.join(found['files'])}; opened again: {found['difference']:.1e} from the run's model")
