"""`manta serve`."""

import ipaddress
import os
import secrets
import sys
from typing import Annotated

import typer

from jobs.commands.app import INTERRUPTED, app, import_from_here
from jobs.commands.options import GpuOption, RunArgument, VerboseOption
from nn_models.errors import UserError

TOKEN = "MANTA_SERVE_TOKEN"  # an option would be seen by everybody on this machine
SHORTEST_TOKEN = 16


@app.command()
def serve(
    run: RunArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for one that is free.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others reach needs a token (MANTA_SERVE_TOKEN).")
    ] = "127.0.0.1",
    replicas: Annotated[int, typer.Option(min=1, max=256, help="Processes with the model, each on a core.")] = 1,
    max_body: Annotated[int, typer.Option(metavar="MIB", min=1, max=1024, help="Largest request.")] = 16,
    max_rows: Annotated[int, typer.Option(min=1, max=100_000, help="Most rows of a request.")] = 1024,
    gpu: GpuOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve a run's best model over HTTP until Ctrl-C, with a page to try it: from RUN/model alone.

    POST /predict takes {"rows": [...]}, pictures or a text. With a token, POST /model {"run": PATH} swaps in another
    run; no request is dropped then.
    """
    from cluster.inference.serving import check_installed
    from cluster.runtime import configure_ray

    where, token = _address(host), os.environ.get(TOKEN)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise UserError(TOKEN, f"a token of {len(token)} characters", f"choose one of at least {SHORTEST_TOKEN}")
    made = None if token or where.is_loopback else secrets.token_urlsafe(32)
    import_from_here()
    check_installed()
    configure_ray()
    from cluster.inference.serving.deployment import Settings, serve_run
    from cluster.inference.serving.requests import Limits

    limits = Limits(body_bytes=max_body << 20, rows=max_rows)
    settings = Settings(str(where), port, replicas=replicas, use_gpu=gpu, token=token or made, limits=limits)

    def ready(place: str, port: int) -> None:
        name = f"[{where}]" if where.version == 6 else str(where)
        print(f"http://{name}:{port}/", flush=True)
        if made:
            _say(f"token: {made}")
        _say(f"serves {place}; Ctrl-C stops it")

    try:
        serve_run(run, settings, verbose=verbose, ready=ready)
    except KeyboardInterrupt:
        _say("stopped")
        raise typer.Exit(INTERRUPTED) from None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        fix = "give one such as 127.0.0.1, or 0.0.0.0 for all of this machine"
        raise UserError("--host", f"{host!r} is no address", fix) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
