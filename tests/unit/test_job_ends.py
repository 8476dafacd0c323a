"""How a job's end is told, and the exit code of a command that waited for it."""

import pytest

from cluster.submission.client import Job, _reason
from jobs.commands.submitted import told_end, why

LOG = "Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n"
UNSET = "runtime_env setup failed: Failed to set up runtime environment.\nTraceback …\nOSError: no such package\n"


def ended(status: str, message: str = "", exit_code: int | None = None) -> Job:
    return Job("job-7", status, message, exit_code, 100.0, 3765.0, {}, "python -m jobs")


@pytest.mark.parametrize(
    ("job", "code", "told"),
    [
        (ended("SUCCEEDED", exit_code=0), 0, "job-7 succeeded in 1:01:05"),
        (ended("STOPPED"), 130, "error: job-7 was stopped"),
        (ended("FAILED", LOG + "one\nerror: a: b\n::manta {}\n", 2), 2, "error: job-7 failed: exit code 2: a: b"),
        (ended("FAILED", LOG + "Killed\n", -9), 1, "error: job-7 failed: exit code -9: Killed"),
        (
            ended("FAILED", LOG + "/usr/bin/python: No module named jobs\n", 1),
            1,
            "error: job-7 failed: the nodes have no manta: submit with --with-manta, or install it there",
        ),
        (
            ended("FAILED", UNSET),
            1,
            "error: job-7 failed: its runtime environment could not be set up: OSError: no such package",
        ),
        (ended("FAILED", "the node has died"), 1, "error: job-7 failed: the node has died"),
        (ended("FAILED"), 1, "error: job-7 failed: failed"),
    ],
)
def test_ends(job, code, told, capsys):
    assert told_end(job) == code
    assert capsys.readouterr().err == f"{told}\n"


def test_why_one_waits():
    assert why(ended("PENDING", "Job has not started yet. It may be waiting for resources.")).endswith("for resources.")


def test_the_reason_of_a_server_is_the_last_line_of_its_traceback():
    told = "Request failed with status code 500: Traceback (most recent call last):\n  …\nValueError: it is so\n."
    assert _reason(told) == "ValueError: it is so"
    assert _reason("") == "it gave no reason"
