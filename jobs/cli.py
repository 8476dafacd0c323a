"""The `manta` command. Heavy imports (torch, ray) happen inside the commands, so that --help is quick."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from jobs.commands.app import DONE, FAILED, INTERRUPTED, USER_ERROR, app, complain
from nn_models.errors import UserError

# Each adds its commands, in the order of `manta --help`.
# isort: off
from jobs.commands import training, sweeping, showing, using, predicting, coding  # noqa: F401
from jobs.commands import exporting, serving, submitting, submitted, doctor, data  # noqa: F401
# isort: on

PACKAGES = ("cluster", "jobs", "nn_models")


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 the run failed, 2 the user must change something, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    with _messages_shown():
        code = _run_app()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        code = _no_more_output()
    except OSError as error:
        code = complain(f"standard output: {error.strerror}", USER_ERROR)
        _no_more_output()
    sys.exit(code if isinstance(code, int) else DONE)


def _run_app() -> Any:
    """The exit code, or what the command returned."""
    try:
        _refuse_a_directory_that_is_gone()
        return app(standalone_mode=False)
    except SystemExit as ended:  # how typer takes a broken pipe
        return _no_more_output() if isinstance(ended.__context__, BrokenPipeError) else ended.code
    except UserError as error:
        return complain(str(error), USER_ERROR)
    except (typer.Abort, KeyboardInterrupt):
        return complain("interrupted", INTERRUPTED)
    except MemoryError as error:
        words = f"memory: there is not enough of it ({error or 'none is left'})"
        return complain(f"{words}; make the model, rows or batches smaller", FAILED)
    except Exception as error:
        return _other(error)


class _ToStandardError(logging.StreamHandler[Any]):
    """Shows the packages' own messages, on what standard error is at the time: above a progress bar, not across it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self.addFilter(lambda record: record.name.startswith(PACKAGES))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
def _messages_shown() -> Iterator[None]:
    root = logging.getLogger()
    if not any(isinstance(handler, _ToStandardError) for handler in root.handlers):
        root.addHandler(_ToStandardError())  # stays: without any, Python shows what others have to say at its end
    level = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)


def _refuse_a_directory_that_is_gone() -> None:
    """Paths are relative to it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("", "the current directory is gone", "cd to one that exists") from None


def _no_more_output() -> int:
    """Whoever read the output has seen enough (`| head`): no failure. Keeps Python from trying again at its end."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    return DONE


def _other(error: Exception) -> int:
    from cluster.errors import RunFailed

    if isinstance(error, RunFailed):
        return complain(str(error), FAILED)
    if hasattr(error, "format_message"):  # typer's usage errors
        path = getattr(getattr(error, "ctx", None), "command_path", "manta")
        message = error.format_message()
        # without a message: a group of commands was asked for, and its help has been shown
        return complain(f"{message} (`{path} --help` tells more)", USER_ERROR) if message else USER_ERROR
    raise error


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
