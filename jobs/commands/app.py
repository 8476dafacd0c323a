"""The typer application that the commands are added to, the exit codes, and how an error is told."""

import os
import sys

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train the classic neural-network architectures: in this process, on a local Ray, or on a cluster.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare data as Parquet shards, and look at them.")
app.add_typer(data_app, name="data")

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def complain(message: str, code: int) -> int:
    """Tell it on standard error, and return the exit code."""
    printable = message.encode("utf-8", "backslashreplace").decode()  # half a character of UTF-16, from a file's YAML
    for line in printable.split("\n"):  # other ends of lines may stand in a name
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def import_from_here() -> None:
    """Let custom models stand where the user is; last, so that no file there takes a library's place.

    For the commands that build models: no other needs to import what is there.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
