"""`manta doctor`: checks before a long job, of this machine or of every node of a cluster."""

import json
import os
from typing import Annotated

import typer

from jobs.commands.app import FAILED, app, import_from_here
from jobs.commands.options import GpuOption, JsonOption, SetOption, VerboseOption, overrides
from nn_models.errors import UserError

MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("FAILED", "red")}


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe that is to be run: it is checked too.")] = None,
    set_: SetOption = None,
    run: Annotated[str | None, typer.Option(help="Directory or URI that runs are to be written to.")] = None,
    workers: Annotated[str | None, typer.Option(help="Ray workers that there must be room for.")] = None,
    gpu: GpuOption = False,
    address: Annotated[str | None, typer.Option(help="The Ray cluster to check, HOST:PORT; else this machine.")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check this machine, or every node of a cluster, before a long job; exit code 1 where a check failed."""
    from cluster.runtime import configure_ray, parse_workers

    import_from_here()
    if address is not None and address.startswith(("http://", "https://")):
        line = f"`manta submit doctor{f' {recipe}' if recipe else ''} --address {address} --wait`"
        raise UserError("--address", f"{address}: a job server, and the doctor runs on a node", f"submit it: {line}")
    num_workers = parse_workers(workers) if workers is not None else None
    configure_ray()
    from rich.console import Console
    from rich.text import Text

    from cluster.recipe.loading import load_recipe
    from cluster.runtime.existing import STORAGE, existing
    from cluster.storage import Folder
    from cluster.submission.doctor.examining import Asked, examine
    from cluster.submission.doctor.judging import Line

    if set_ and recipe is None:
        raise UserError("--set", "there is no recipe to change", "name one")
    resolved = load_recipe(recipe, overrides(set_)).model_copy(update={"sweep": None}) if recipe else None
    storage = Folder(run or os.environ.get(STORAGE) or ".")
    lines: list[Line] = []
    console = Console(soft_wrap=True, highlight=False)

    def tell(line: Line) -> None:
        lines.append(line)
        if not as_json:
            mark, colour = MARKS[line.status]
            text = f"{line.check:16} {line.message}{f'; {line.fix}' if line.fix else ''}"
            console.print(Text(f"{mark:8} ", style=colour) + Text(text))

    there = existing(address, wanted=num_workers is None or num_workers[1] > 0)
    asked = Asked(storage.uri, resolved, num_workers, gpu)
    examine(asked, there=there, tell=tell, verbose=verbose)
    num_failed = sum(line.status == "failed" for line in lines)
    if as_json:
        print(json.dumps({"ok": not num_failed, "checks": [line.facts() for line in lines]}))
    if num_failed:
        raise typer.Exit(FAILED)
