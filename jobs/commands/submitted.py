"""`manta jobs`: the jobs of a cluster: list, status, logs, stop, result."""

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.app import DONE, FAILED, INTERRUPTED, USER_ERROR, app, complain
from jobs.commands.options import JsonOption
from jobs.commands.submitting import ServerOption
from nn_models.errors import UserError

if TYPE_CHECKING:
    from cluster.submission.client import Job, JobServer

jobs_app = typer.Typer(no_args_is_help=True, help="The jobs of a cluster: list, status, logs, stop, result.")
app.add_typer(jobs_app, name="jobs")

JobArgument = Annotated[str, typer.Argument(metavar="ID", help="A job's id.")]
STOPPING_S = 90.0  # what writes its checkpoint is given time
OWN_CODES = (FAILED, USER_ERROR, INTERRUPTED)


@jobs_app.command("list")
def list_jobs(address: ServerOption = None, as_json: JsonOption = False) -> None:
    """List the cluster's jobs, the newest first."""
    from rich.console import Console
    from rich.table import Table

    found = _server(address).jobs()
    if as_json:
        print(json.dumps([job.facts() for job in found]))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head, width in (("job", max((len(job.id) for job in found), default=0)), ("status", 9)):
        table.add_column(head, min_width=width)
    for head in ("what", "began", "took"):
        table.add_column(head)
    for job in found:
        table.add_row(job.id, job.status.lower(), _what(job), _when(job.began), _took(job))
    Console(soft_wrap=True, highlight=False).print(table if found else "no jobs yet")


@jobs_app.command()
def status(job: JobArgument, address: ServerOption = None, as_json: JsonOption = False) -> None:
    """Show how far a job's run is: its epoch, metrics, and how long is left."""
    from cluster.submission.told import Told

    server = _server(address)
    found = server.job(job)
    told = Told(server.log(job, missing_ok=True))
    progress = told.progress(time.time())
    if found.over:
        progress["left_s"] = None
    if as_json:
        print(json.dumps({**found.facts(), **progress, "metrics": _metrics(told, progress)}))
        return
    facts = {
        "status": found.status.lower() + (f", exit code {found.exit_code}" if found.exit_code else ""),
        "what": _what(found),
        "began": _when(found.began),
        "took" if found.over else "so far": _took(found),
        "epoch": f"{progress['epoch']} of {progress['epochs']}" if "epoch" in progress else None,
        "trials": f"{progress['ended']} of {progress['num_trials']} ended" if "num_trials" in progress else None,
        **{name: f"{value:.4f}" for name, value in _metrics(told, progress).items() if value is not None},
        "left": None if progress["left_s"] is None else f"about {_duration(progress['left_s'])}",
        "run": told.run,
        "why": why(found) if found.status == "FAILED" or (found.status == "PENDING" and found.message) else None,
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value is not None:
            print(f"{name:{width}}  {value}")


@jobs_app.command()
def logs(
    job: JobArgument,
    address: ServerOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """Print a job's log; with -f exit as the job does."""
    from cluster.submission.follow import Lines

    server = _server(address)
    if follow:
        raise typer.Exit(told_end(followed(server, job)))
    lines = Lines(_print)
    lines.whole(server.log(job))
    lines.end()


@jobs_app.command()
def stop(job: JobArgument, address: ServerOption = None, as_json: JsonOption = False) -> None:
    """Stop a job, and wait until it has ended."""
    from cluster.errors import RunFailed

    server = _server(address)
    found = server.job(job)
    if not found.over:
        server.stop(job)
    until = time.monotonic() + STOPPING_S
    while not found.over:
        if time.monotonic() > until:
            raise RunFailed(f"{job} has not ended within {STOPPING_S:.0f} s of being told to")
        time.sleep(0.3)
        found = server.job(job)
    print(json.dumps(found.facts()) if as_json else f"{job} {found.status.lower()}")


@jobs_app.command()
def result(job: JobArgument, address: ServerOption = None, as_json: JsonOption = False) -> None:
    """Bring result.json of a job's run."""
    from cluster.errors import RunFailed
    from cluster.submission.told import Told
    from jobs.commands.printing import print_outcome

    server = _server(address)
    found = server.job(job)
    told = Told(server.log(job))
    if told.result is None:
        if not found.over:
            raise UserError(job, f"{found.status.lower()}: there is no result yet", f"`manta jobs logs {job} -f` waits")
        raise RunFailed(f"{job} {found.status.lower()} without a result: {why(found)}")
    if as_json:
        print(json.dumps({"job": job, "run": told.run, **told.result}))
        return
    facts = {"status": told.result["status"], "error": told.result.get("error"), "run": told.run}
    print_outcome(told.result.get("metrics") or {}, facts)


def followed(server: "JobServer", job: str, *, quiet: bool = False) -> "Job":
    """Print the job's log to its end, on standard output, or, `quiet`, on standard error. Returns how it ended.

    An interrupt ends the following alone, and says so.
    """
    from cluster.submission.follow import follow as follow_log

    try:
        return follow_log(server, job, (lambda line: print(line, file=sys.stderr, flush=True)) if quiet else _print)
    except KeyboardInterrupt:
        where = f"{job} --address {server.url}"
        message = (
            f"interrupted; the job goes on: `manta jobs logs -f {where}` follows it, `manta jobs stop {where}` ends it"
        )
        raise typer.Exit(complain(message, INTERRUPTED)) from None


def told_end(job: "Job") -> int:
    """Say how the job ended; the exit code of a command that does as the job did."""
    if job.status == "SUCCEEDED":
        print(f"{job.id} succeeded in {_took(job)}", file=sys.stderr, flush=True)
        return DONE
    if job.status == "STOPPED":
        return complain(f"{job.id} was stopped", INTERRUPTED)
    code = job.exit_code if job.exit_code in OWN_CODES else FAILED
    return complain(f"{job.id} failed: {why(job)}", code)


def why(job: "Job") -> str:
    """In one line, why a job has failed, or waits."""
    from cluster.submission.told import is_told

    lines = [line.strip() for line in job.message.splitlines() if line.strip() and not is_told(line)]
    if "No module named jobs" in job.message or "No module named 'jobs'" in job.message:
        return "the nodes have no manta: submit with --with-manta, or install it there"
    if job.exit_code is not None:
        last = f": {lines[-1].removeprefix('error: ')}" if lines else ""
        return f"exit code {job.exit_code}{last}"
    if "runtime_env" in job.message.lower() or "runtime environment" in job.message.lower():
        return f"its runtime environment could not be set up: {_telling(lines)}"
    return lines[-1] if lines else job.status.lower()


def _telling(lines: list[str]) -> str:
    """The line of a traceback that says what went wrong."""
    errors = [line for line in lines if "error" in line.lower() or "exception" in line.lower()]
    return (errors or lines)[-1]


def _server(address: str | None) -> "JobServer":
    from cluster.submission.client import JobServer

    return JobServer(address)


def _print(line: str) -> None:
    print(line, flush=True)


def _what(job: "Job") -> str:
    known = job.metadata
    return f"{known['manta']} {known.get('recipe', '')}".strip() if "manta" in known else job.entrypoint


def _metrics(told: Any, progress: Mapping[str, Any]) -> dict[str, float | None]:
    """Those of the result where there is one, else the newest."""
    if told.result:
        return dict(told.result.get("metrics") or {})
    best = {progress["metric"]: progress["best"]} if progress.get("best") is not None else {}
    return {**progress.get("metrics", {}), **best}


def _when(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else ""


def _took(job: "Job") -> str:
    return _duration((job.ended or time.time()) - job.began) if job.began else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
