"""Jobs on a real cluster with its real job server: submitted, followed, stopped, asked for; and what goes wrong."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.submission import client, follow
from cluster.submission.client import JobServer, ServerLost
from jobs import cli
from nn_models.errors import UserError
from tests.ray.faults import steps_done, wait_for
from tests.ray.heads import ROOT, Head, Proxy, started_head

NET = """
import sys

import cluster
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        print("cluster is", cluster.__file__, file=sys.stderr)

class Broken(Net):
    def forward(self, rows):
        if rows.device.type != "meta":
            raise RuntimeError("this net is broken")
        return super().forward(rows)
"""
NUM_LINES = 400
LONG = 50_000  # characters of one line: Ray sends such a line in one piece, of others ten at once
CHATTY = f"""
import sys, time
for number in range({NUM_LINES}):
    print(number, "é" * ({LONG} if number == 200 else 1), flush=True)
    time.sleep(0.01)
sys.stdout.write("the end")
"""
ONE_EPOCH = "--set=train.epochs=1"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class User:
    """Who has a folder, a token, and the address of a job server, and types commands."""

    def __init__(self, head: Head, folder: Path) -> None:
        self.head, self.folder = head, folder

    def manta(self, *arguments: object, shown: StringIO | None = None, **environment: str) -> Ended:
        """The command in this process: importing torch and Ray anew takes seconds."""
        out, err = shown or StringIO(), StringIO()
        settings = {"RAY_API_SERVER_ADDRESS": self.head.url, "RAY_AUTH_TOKEN": self.head.token, **environment}
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            patch.delenv("RAY_ADDRESS", raising=False)
            for name, value in settings.items():
                patch.setenv(name, value) if value else patch.delenv(name, raising=False)
            patch.setattr(sys, "argv", ["manta", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    def refused(self, *arguments: object, **environment: str) -> str:
        code, out, err = self.manta(*arguments, **environment)
        assert (code, out) == (2, ""), err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err
        return errors[0]

    def server(self, url: str | None = None) -> JobServer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN", self.head.token)
            return JobServer(url or self.head.url)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "nets.py").write_text(NET)
    (folder / "chatty.py").write_text(CHATTY)
    data = "data: {kind: digits}\ntrain: {epochs: 1}\n"
    (folder / "own.yaml").write_text(f'model: {{kind: custom, target: "nets:Net"}}\n{data}')
    (folder / "broken.yaml").write_text(f'model: {{kind: custom, target: "nets:Broken"}}\n{data}')
    with started_head(num_cpus=6) as head:
        yield User(head, folder)


@pytest.fixture(scope="module")
def runs(user: User) -> Path:
    """Where the runs are of some jobs that go on at once, by their names: starting processes takes most of the time."""
    runs = user.folder.parent / "runs"
    submitted = {
        "endless": ["train", "digits-mlp", "--set=train.epochs=1000000", "--set=train.log_every_steps=1"],
        "own": ["train", "own.yaml", "--workers=1", "--with-manta", "--metadata=who=me", "--entrypoint-num-cpus=1"],
        "broken": ["train", "broken.yaml"],
        "gan": ["train", "digits-dcgan", "--workers=1", ONE_EPOCH],
        "sweep": ["sweep", "digits-mlp", "--fuse=off", ONE_EPOCH, "--set=sweep.num_trials=2", "--concurrency=1"],
    }
    for name, (verb, *arguments) in submitted.items():
        place = [f"--run={runs / name}", "--no-report", f"--job-id={name}"]
        code, out, err = user.manta("submit", verb, *arguments, *place)
        assert (code, out) == (0, f"{name}\n"), err
        assert f"to be uploaded: {user.folder}" in err
        assert ("uploading manta" in err) == (name == "own")
    return runs


def test_a_log_is_followed_across_dropped_connections_each_line_once_in_order(user: User, runs: Path):
    server = user.server()
    proxy = Proxy(int(user.head.url.rpartition(":")[2]))
    server.submit("chatty", f"python {shlex.quote(str(user.folder / 'chatty.py'))}", {})
    seen: list[str] = []

    def show(line: str) -> None:
        seen.append(line)
        if line.partition(" ")[0] in ("50", "199", "200", "390"):
            proxy.drop()

    ended = follow.follow(user.server(proxy.url), "chatty", show)
    assert proxy.num_dropped >= 3
    assert ended.status == "SUCCEEDED"
    own = [line for line in seen if line[:1].isdigit() and " é" in line] + seen[-1:]
    assert own == [f"{n} {'é' * (LONG if n == 200 else 1)}" for n in range(NUM_LINES)] + ["the end"]


@pytest.mark.parametrize("how", ["die", "fall_silent"])
def test_a_job_server_that_dies_in_mid_follow_ends_following_in_bounded_time(
    user: User, runs: Path, how: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(follow, "HEARTBEAT_S", 1.0)
    monkeypatch.setattr(client, "ANSWER_S", 1.0)
    proxy = Proxy(int(user.head.url.rpartition(":")[2]))
    server = user.server(proxy.url)
    began: list[float] = []

    def show(line: str) -> None:
        if not began:
            began.append(time.monotonic())
            getattr(proxy, how)()

    with pytest.raises(ServerLost, match=r"has not answered for 2 s; the job endless may go on: `manta jobs status"):
        follow.follow(server, "endless", show, patience_s=2.0)
    assert time.monotonic() - began[0] < 20


class Interrupting(StringIO):
    """What a terminal shows; once it is this, the user types Ctrl-C."""

    def __init__(self, until: str) -> None:
        super().__init__()
        self._until, self._done = until, False

    def write(self, text: str) -> int:
        written = super().write(text)
        if not self._done and self._until in self.getvalue():
            self._done = True
            signal.raise_signal(signal.SIGINT)
        return written


@pytest.mark.parametrize("command", ["logs", "submit"])
def test_an_interrupt_ends_the_following_and_says_that_the_job_goes_on(user: User, runs: Path, command: str):
    job = "endless" if command == "logs" else "waited-for"
    place = ["digits-mlp", "--set=train.epochs=100000", "--no-report", f"--run={runs / job}", f"--job-id={job}"]
    line = ["jobs", "logs", "-f", job] if command == "logs" else ["submit", "train", *place, "--wait"]
    code, _, err = user.manta(*line, shown=Interrupting("epoch 1/"))
    assert code == 130
    where = f"{job} --address {user.head.url}"
    told = f"interrupted; the job goes on: `manta jobs logs -f {where}` follows it, `manta jobs stop {where}` ends it"
    assert err.splitlines()[-1] == f"error: {told}"
    assert json.loads(user.manta("jobs", "status", job, "--json").out)["status"] == "RUNNING"
    if command == "submit":
        assert user.manta("jobs", "stop", job).out == f"{job} stopped\n"


def test_status_tells_how_far_a_run_is_and_stop_ends_it_with_its_result_written(user: User, runs: Path):
    wait_for(lambda: steps_done(runs / "endless") > 100)
    told = json.loads(user.manta("jobs", "status", "endless", "--json").out)
    assert told["status"] == "RUNNING"
    assert 1 <= told["epoch"] < told["epochs"] == 1_000_000
    assert told["metrics"]["train/loss"] > 0
    assert told["left_s"] > 0
    shown = user.manta("jobs", "status", "endless").out
    assert f"of {told['epochs']}" in shown
    assert "left" in shown
    assert "running: there is no result yet" in user.refused("jobs", "result", "endless")
    assert user.manta("jobs", "stop", "endless").out == "endless stopped\n"
    result = json.loads(user.manta("jobs", "result", "endless", "--json").out)
    assert result["status"] == "stopped"
    assert result == {"job": "endless", "run": str(runs / "endless"), **written(runs / "endless")}
    code, out, err = user.manta("jobs", "logs", "-f", "endless")
    assert (code, err) == (130, "error: endless was stopped\n")
    assert f":{user.head.port} (RAY_ADDRESS, in the job endless) is not used" in out.splitlines()[2]
    assert "::manta" not in out


def written(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


@pytest.mark.parametrize("job", ["own", "gan", "sweep"])
def test_jobs_that_succeed(user: User, runs: Path, job: str):
    code, out, err = user.manta("jobs", "logs", "-f", job)
    assert (code, err.startswith(f"{job} succeeded in ")) == (0, True), out + err
    first = out.splitlines()[2]  # after what the job server says
    assert first.startswith("INFO: using the Ray cluster at ")
    assert first.endswith(f":{user.head.port} (RAY_ADDRESS, in the job {job})")
    assert json.loads(user.manta("jobs", "result", job, "--json").out) == {
        "job": job,
        "run": str(runs / job),
        **written(runs / job),
    }
    told = json.loads(user.manta("jobs", "status", job, "--json").out)
    assert (told["status"], told["exit_code"], told["run"]) == ("SUCCEEDED", 0, str(runs / job))
    if job == "own":
        assert "py_modules_files" in next(line for line in out.splitlines() if line.startswith("cluster is "))
        assert told["metadata"]["who"] == "me"
    if job == "sweep":
        assert (told["ended"], told["num_trials"]) == (2, 2)


def test_a_job_that_fails_ends_waiting_with_its_last_lines_and_its_code(user: User, runs: Path):
    code, out, err = user.manta("jobs", "logs", "-f", "broken")
    assert code == 1
    assert "error: RuntimeError: this net is broken" in out
    assert err == "error: broken failed: exit code 1: RuntimeError: this net is broken\n"
    assert "RuntimeError: this net is broken" in user.manta("jobs", "status", "broken").out


def test_waiting_follows_a_new_job_and_exits_as_it_does(user: User, runs: Path, tmp_path: Path):
    submit = ["submit", "train", "digits-mlp", "--wait", "--no-report", ONE_EPOCH]
    code, out, err = user.manta(*submit)
    assert code == 2  # only the job finds out
    assert "error: --run: " in out
    assert re.search(r"error: digits-mlp-\w{8} failed: exit code 2: --run: .* lies in Ray's temporary folder, .*", err)
    (tmp_path / "own.env").write_text(f"MANTA_STORAGE={runs}\n")
    (tmp_path / "empty").mkdir()
    nothing = User(user.head, tmp_path / "empty")
    code, out, err = nothing.manta(*submit, "--json", f"--env-file={tmp_path / 'own.env'}")
    assert code == 0, err
    assert f"to be uploaded: {nothing.folder}, 0 files, 0 B\n" in err
    told = json.loads(out)
    assert told["result"] == written(Path(told["run"]))
    assert Path(told["run"]).is_relative_to(runs / "runs")
    taken = user.refused("submit", "train", "digits-mlp", "--job-id=own", f"--run={tmp_path / 'x'}")
    assert taken == "error: --job-id: own is taken; choose another"


def test_of_two_jobs_with_one_id_at_once_one_is_refused(user: User):
    def submit(server: JobServer) -> str:
        try:
            server.submit("twice", "true", {})
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as both:
        told = sorted(both.map(submit, [user.server(), user.server()]))
    assert told == ["", "--job-id: twice is taken; choose another"]


def test_jobs_are_listed_for_people_and_programs(user: User, runs: Path):
    listed = json.loads(user.manta("jobs", "list", "--json").out)
    assert {"endless", "own", "broken", "gan", "sweep"} <= {job["id"] for job in listed}
    shown = user.manta("jobs", "list").out
    assert "train broken.yaml" in shown
    assert "sweep digits-mlp" in shown


def test_a_runtime_environment_that_cannot_be_set_up(user: User, tmp_path: Path):
    (tmp_path / "none.yaml").write_text("conda: no-such-environment\n")
    job = ["--wait", "--job-id=unset", f"--runtime-env={tmp_path / 'none.yaml'}", f"--run={tmp_path / 'run'}"]
    began = time.monotonic()
    code, _, err = user.manta("submit", "train", "digits-mlp", *job)
    assert code == 1
    assert "error: unset failed: its runtime environment could not be set up: " in err
    assert time.monotonic() - began < 100
    assert json.loads(user.manta("jobs", "status", "unset", "--json").out)["status"] == "FAILED"
    code, _, err = user.manta("jobs", "result", "unset")
    assert (code, err.count("\n")) == (1, 1)


def test_what_is_refused_before_anything_is_uploaded(user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("uploaded")

    monkeypatch.setattr(JobServer, "submit", never)
    submit = ["submit", "train", "digits-mlp", f"--run={tmp_path / 'run'}"]
    assert "model.hiden: unknown field; did you mean hidden?" in user.refused(*submit, "--set=model.hiden=3")
    assert "can never be placed: the cluster at " in user.refused(*submit, "--workers=2", "--gpu")
    assert "can never be placed: the cluster at " in user.refused(*submit, "--workers=7")
    assert "the job's own process can never be placed" in user.refused(*submit, "--entrypoint-num-gpus=1")
    assert "No such option: --worker" in user.refused(*submit, "--worker=3")
    assert "--run: here would be in the job's own folder" in user.refused("submit", "train", "digits-mlp", "--run=here")
    large = tmp_path / "large"
    large.mkdir()
    (large / "video.bin").write_bytes(bytes(2 << 20))
    too_much = User(user.head, large).refused(*submit, "--upload-limit=1")
    assert "2 MiB would be uploaded, more than 1 MiB; largest: video.bin 2 MiB; list in .rayignore" in too_much


def test_wrong_tokens_addresses_and_ids_are_told_in_one_line(user: User, tmp_path: Path):
    home = {"HOME": str(tmp_path)}
    none = user.refused("jobs", "list", RAY_AUTH_TOKEN="", **home)
    assert "this cluster wants a token and there is none here; copy the head node's ~/.ray/auth_token" in none
    assert "wants a token that is not the one here" in user.refused("jobs", "list", RAY_AUTH_TOKEN="f" * 64)
    assert "unset RAY_AUTH_MODE" in user.refused("jobs", "list", RAY_AUTH_MODE="disabled")
    assert "no such job on the cluster" in user.refused("jobs", "status", "nobody")
    assert "no such job on the cluster" in user.refused("jobs", "stop", "nobody")
    for where in ("http://127.0.0.1:9", f"127.0.0.1:{user.head.port}"):  # nobody; Ray itself, which speaks no HTTP
        assert "no job server of a Ray cluster answers there" in user.refused("jobs", "list", f"--address={where}")


def test_a_driver_with_a_wrong_token_is_told_in_one_line(user: User, tmp_path: Path):
    """In a process of its own: in one that has a Ray already, as a session of tests has, that one is used."""
    line = ["train", "digits-mlp", "--workers=1", f"--run={tmp_path / 'run'}", ONE_EPOCH]
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    there = {"RAY_ADDRESS": f"127.0.0.1:{user.head.port}", "RAY_AUTH_TOKEN": "f" * 64, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs", *line]
    train = subprocess.run(command, env=mine | there, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (train.returncode, train.stdout) == (2, ""), train.stderr
    (told,) = [said for said in train.stderr.splitlines() if not said.startswith("INFO: ")]
    assert told.startswith("error: RAY_ADDRESS: ")
    assert "this cluster wants a token that is not the one here" in told


@pytest.mark.parametrize("where", ["RAY_AUTH_TOKEN_PATH", "HOME"])
def test_the_token_is_found_in_files(user: User, tmp_path: Path, where: str):
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(user.head.token)
    settings = {where: str(file if where == "RAY_AUTH_TOKEN_PATH" else tmp_path)}
    code, _, err = user.manta("jobs", "list", RAY_AUTH_TOKEN="", **settings)
    assert code == 0, err


def test_a_submitted_doctor_examines_the_cluster_and_its_job_fails_with_a_check(user: User):
    code, out, err = user.manta("submit", "doctor", "digits-mlp", "--wait", "--job-id=doctor")
    assert code == 1, out + err
    assert err.splitlines()[-1].startswith("error: doctor failed: exit code 1: ")
    lines = {line[9:25].strip(): line for line in out.splitlines() if line.startswith(("ok ", "FAILED ", "warning "))}
    assert {"nodes", "versions", "cores", "object store", "disk", "recipe", "placement", "first step"} <= set(lines)
    failed = [name for name, line in lines.items() if line.startswith("FAILED")]
    assert failed == ["storage"]
    assert "lies in Ray's temporary folder, which goes with the cluster" in lines["storage"]
