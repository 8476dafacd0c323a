"""Lines of a log that comes in pieces and again; what a log tells of a run."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.submission import follow
from cluster.submission.client import Job, ServerLost
from cluster.submission.follow import Lines, _Dropped
from cluster.submission.told import PREFIX, Told, telling
from jobs.commands.progress import Progress


@given(
    st.lists(st.text("ab é", max_size=5), max_size=20),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6),
)
def test_each_line_comes_once_and_in_order_however_often_the_log_begins_again(lines, ends, tries):
    text = "\n".join(lines) + "\n" * ends
    shown: list[str] = []
    taken = Lines(shown.append)
    for length, step in tries:  # connections that drop after so many characters, which come in pieces
        take = taken.restarted()
        for place in range(0, min(length, len(text)), step):
            take(text[place : min(place + step, length)])
    taken.whole(text)
    taken.end()
    assert shown == (text.removesuffix("\n").split("\n") if text else [])


def test_lines_for_programs_are_not_shown():
    shown: list[str] = []
    lines = Lines(shown.append)
    lines.whole(f"one\n{PREFIX}{{}}\ntwo\n{PREFIX}{{")
    lines.end()
    assert shown == ["one", "two"]


def line(kind: str, at: float, **facts: Any) -> str:
    return PREFIX + json.dumps({"kind": kind, "at": at, **facts})


def epoch(number: int, at: float, *, whole: bool = True, **metrics: float) -> str:
    return line("epoch", at, epoch=number, epochs=10, step=number * 5, whole=whole, metrics=metrics)


def test_what_is_left_follows_from_the_epochs_so_far():
    log = [line("begun", 100.0, verb="train", run="/r", name="n"), "epoch 1/10 …", epoch(1, 120.0, a=1.0)]
    log += [epoch(2, 140.0, a=2.0, b=3.0), epoch(3, 146.0, whole=False, a=4.0), f"{PREFIX}{{cut"]
    progress = Told("\n".join(log)).progress(150.0)
    assert (progress["epoch"], progress["epochs"], progress["run"]) == (3, 10, "/r")
    assert progress["metrics"] == {"a": 4.0, "b": 3.0}
    assert progress["left_s"] == pytest.approx(8 * 20 - 10)  # 20 s an epoch; the third began 10 s ago


def test_a_run_that_goes_on_is_measured_from_where_it_went_on():
    log = [line("begun", 100.0, verb="train", run="/r"), epoch(6, 110.0), epoch(7, 120.0)]
    assert Told("\n".join(log)).progress(120.0)["left_s"] == pytest.approx(3 * 10)


def test_a_sweep_and_a_log_that_tells_nothing():
    log = [line("begun", 10.0, verb="sweep", run="/s")]
    log += [line("trials", 40.0, ended=4, ended_before=1, num_trials=10, metric="validation/loss", best=0.5)]
    progress = Told("\n".join(log)).progress(40.0)
    assert (progress["ended"], progress["best"], progress["left_s"]) == (4, 0.5, pytest.approx(60))
    nothing = Told("hello\n")
    assert (nothing.run, nothing.result, nothing.progress(1.0)) == (None, None, {"left_s": None})


def test_a_job_tells_of_its_run_and_nobody_else_does(tmp_path, monkeypatch, capsys):
    told = {"step": 5, "epoch": 0, "split": "train", "end_of_epoch": True, "loss": 0.5, "time_s": 1.0}
    for job in ("", "1"):
        monkeypatch.setenv("MANTA_JOB", job)
        run = tmp_path / f"run{job}"
        run.mkdir()
        with telling("train", str(run), name="n"):
            with Progress("n", epochs=2) as progress:
                progress(told)
            (run / "result.json").write_text('{"status": "finished", "metrics": {"test/loss": 1.0}}')
        log = capsys.readouterr().err
        assert "epoch 1/2" in log
        assert (PREFIX in log) == bool(job)
    found = Told(log)
    assert found.run == str(run)
    assert found.result == {"status": "finished", "metrics": {"test/loss": 1.0}}
    assert found.progress(time.time())["metrics"] == {"train/loss": 0.5}


def test_an_earlier_result_is_not_told_as_that_of_a_run_that_did_not_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MANTA_JOB", "1")
    (tmp_path / "result.json").write_text('{"status": "failed", "metrics": {}}')
    with pytest.raises(KeyboardInterrupt), telling("train", str(tmp_path)):
        raise KeyboardInterrupt
    assert Told(capsys.readouterr().err).result is None


class Server:
    """A job server whose job has these statuses, one after another, and whose log ends or breaks after so much."""

    url = "http://127.0.0.1:8265"

    def __init__(self, statuses: list[str], breaks: list[int]) -> None:
        self.statuses, self.breaks = statuses, breaks

    def job(self, job: str) -> Job:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status == "silent":
            raise ServerLost("no answer")
        return Job(job, status, "It may be waiting\nfor resources.", None, None, None, {}, "")

    def log(self, job: str, *, missing_ok: bool = False) -> str:
        return LOG

    async def tail(self, job: str) -> AsyncIterator[str]:
        place = self.breaks.pop(0) if self.breaks else 0
        yield LOG[:place]
        if place % 2:  # else the server says that there is no more
            raise _Dropped


LOG = "one\ntwo\nthree\nfour"


@pytest.fixture
def watched(monkeypatch):
    """Follows such a server; returns what was shown, and how it ended."""

    def run(*statuses: str, breaks: Sequence[int] = (), patience_s: float = 30.0) -> tuple[list[str], str]:
        server, shown = Server(list(statuses), list(breaks)), []
        monkeypatch.setattr(follow, "_tail", Server.tail)
        monkeypatch.setattr(follow, "AGAIN_S", 0.0)
        ended = follow.follow(server, "job", shown.append, patience_s=patience_s)
        assert server.statuses == [statuses[-1]]  # all were seen
        return shown, ended.status

    return run


@pytest.mark.parametrize("last", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_a_log_that_ends_does_not_say_how_the_job_does(watched, last):
    assert watched("PENDING", "PENDING", "RUNNING", "RUNNING", last, breaks=[0, 8, 18]) == (LOG.split("\n"), last)


def test_a_job_that_waits_for_long_says_why_once(watched, monkeypatch, caplog):
    caplog.set_level("INFO")
    watched("PENDING", "PENDING", "SUCCEEDED")
    assert not caplog.messages
    monkeypatch.setattr(follow, "PENDING_S", 0.0)
    watched("PENDING", "PENDING", "PENDING", "SUCCEEDED")
    assert caplog.messages == ["job is pending: It may be waiting for resources."]


@given(st.lists(st.integers(0, len(LOG)), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_connections_may_break_anywhere(watched, breaks):
    assert watched("RUNNING", *["RUNNING"] * len(breaks), "SUCCEEDED", breaks=breaks) == (LOG.split("\n"), "SUCCEEDED")


def test_a_server_that_is_silent_for_a_while_is_waited_for_and_then_given_up(watched):
    statuses = ["RUNNING", "silent", "silent", "RUNNING", "silent", "FAILED"]
    assert watched(*statuses, breaks=[5]) == (LOG.split("\n"), "FAILED")
    with pytest.raises(ServerLost, match=r"has not answered for 0 s; the job job may go on: `manta jobs status job "):
        watched("RUNNING", "silent", patience_s=0.0)
