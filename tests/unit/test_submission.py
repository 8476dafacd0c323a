"""What `manta submit` refuses before anything is uploaded, what it starts; a job server's address and token."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.submission.bundle import bundle
from cluster.submission.client import JobServer, Node, _url, _warn_of_plain_http
from jobs.commands.submission import Asked, admit, environment_of, pairs, start
from nn_models.errors import UserError

COLUMNS = {"a": [float(number) for number in range(40)], "label": ["no", "yes"] * 20}
RUN = "--run=s3://bucket/run"


class Server(JobServer):
    """A cluster of machines elsewhere."""

    url = "http://127.0.0.1:8265"

    def __init__(self, *nodes: dict[str, float], grows: bool = False) -> None:
        self._nodes = [Node("203.0.113.1", "/no/raylet", resources) for resources in nodes]  # RFC 5737
        self._grows = grows
        self.submitted: list[tuple[str, dict[str, Any]]] = []

    def nodes(self) -> list[Node]:
        return self._nodes

    def grows(self) -> bool:
        return self._grows

    def submit(self, job: str, entrypoint: str, runtime_env: Any, **options: Any) -> None:
        self.submitted.append((entrypoint, {"job": job, **runtime_env, **options}))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The user's folder, the current one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    table("rows.parquet")
    return folder


def table(path: str | Path, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns or COLUMNS), path)


def recipe(path: str, name: str = "own.yaml") -> str:
    data = {"kind": "parquet", "path": path, "input": ["a"], "target": "label"}
    Path(name).write_text(yaml.safe_dump({"model": {"kind": "mlp", "hidden": [4]}, "data": data}))
    return name


def admitted(*arguments: str, verb: str = "train", server: Server | None = None, **options: Any) -> None:
    asked = Asked.of(verb, [*arguments, RUN])
    entry = options.pop("entry", {})
    server = server or Server({"CPU": 8})
    admit(asked, bundle(Path.cwd()), server, entry=entry, **{"data_on_cluster": False, **options})


def test_data_that_is_uploaded_is_read_here_first(work):
    admitted(recipe("rows.parquet"))
    table("rows.parquet", a=[1.0])
    with pytest.raises(UserError, match="label"):
        admitted("own.yaml")


def test_data_that_only_this_machine_has_is_refused(work, tmp_path):
    table(tmp_path / "elsewhere.parquet")
    for path in (str(tmp_path / "elsewhere.parquet"), "../elsewhere.parquet", str(work / "rows.parquet")):
        with pytest.raises(UserError, match=rf"data.path: .* is on this machine only; name it relative to {work}"):
            admitted(recipe(path))
        admitted("own.yaml", data_on_cluster=True)
    (work / ".rayignore").write_text("*.parquet\n")
    with pytest.raises(UserError, match=r"data.path: .*rows.parquet is not uploaded; take it out of .gitignore"):
        admitted(recipe("rows.parquet"))


def test_data_that_only_nodes_have_is_looked_at_there(work, caplog):
    caplog.set_level(logging.INFO)
    for path in ("/shared/rows.parquet", "s3://bucket/rows.parquet"):
        caplog.clear()
        admitted(recipe(path))
        assert "the data is looked at in the job only" in caplog.messages


def test_a_recipe_that_is_not_uploaded_is_refused(work, tmp_path):
    name = recipe("rows.parquet")
    with pytest.raises(UserError, match="an absolute path is of this machine"):
        admitted(str(work / name))
    Path(name).rename(tmp_path / "out.yaml")
    with pytest.raises(UserError, match="it is not uploaded"):
        admitted("../out.yaml")


def test_what_never_fits_is_refused_unless_the_cluster_grows(work):
    small, gpus = Server({"CPU": 2}), Server({"CPU": 0}, {"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1})
    with pytest.raises(UserError, match=r"3 workers of 1 CPU each can never be placed: .* has 2 CPU on 1 node;"):
        admitted("digits-mlp", "--workers=3", server=small)
    admitted("digits-mlp", "--workers=2-3", server=small)
    admitted("digits-mlp", "--workers=3", server=Server({"CPU": 2}, grows=True))
    admitted("digits-mlp", "--workers=3", "--gpu", server=gpus)
    with pytest.raises(UserError, match=r"4 workers of 1 CPU and 1 GPU each .* has 16 CPU and 3 GPU on 3 nodes;"):
        admitted("digits-mlp", "--workers=4", "--gpu", server=gpus)
    with pytest.raises(UserError, match=r"4 workers of 1 CPU each can never be placed"):  # two pairs of halves
        admitted("digits-dcgan", "--workers=2", server=small)
    admitted("digits-mlp", verb="sweep", server=small)
    with pytest.raises(UserError, match="a trial's 5 processes can never be placed"):
        admitted("digits-mlp", "--workers=4", verb="sweep", server=small)
    with pytest.raises(UserError, match="the job's own process can never be placed"):
        admitted("digits-mlp", server=small, entry={"CPU": 1, "special": 1})


def test_training_in_the_jobs_own_process(work, caplog):
    caplog.set_level(logging.INFO)
    admitted("digits-mlp")
    assert "--workers 0: the job trains in its own process, on the head node" in caplog.messages
    with pytest.raises(UserError, match="--gpu: --workers 0 trains in the job's own process, which reserves no GPU"):
        admitted("digits-mlp", "--gpu")
    admitted("digits-mlp", "--gpu", server=Server({"GPU": 1}), entry={"GPU": 1})


def test_whether_a_cluster_grows(monkeypatch):
    server = JobServer.__new__(JobServer)
    for labels, grows in (({"ray.io/node-id": "0a"}, False), ({"ray.io/node-group": "head"}, True), (None, False)):
        node = {"node_id": "0a", "node_ip": "203.0.113.1", "state": "ALIVE", "labels": labels}
        told = {"result": {"result": [node]}, "summary": []}
        monkeypatch.setattr(server, "_get", lambda path, told=told: told)
        assert server.grows() == grows


@pytest.mark.parametrize("job", ["", "a b", "../jobs", "a/b", "-x", "x" * 101])
def test_an_id_that_no_job_can_have(job):
    with pytest.raises(UserError, match="is no id of a job"):
        Server().log(job)


def test_what_the_recipe_itself_gets_wrong(work):
    with pytest.raises(UserError, match=r"train.global_batch_size: 4 rows cannot be shared by 8 workers"):
        admitted("digits-mlp", "--workers=8", "--set=train.global_batch_size=4")
    with pytest.raises(UserError, match="sweep: own has no section sweep"):
        admitted(recipe("rows.parquet"), verb="sweep")
    with pytest.raises(UserError, match=r"sweep.metric"):
        admitted("digits-mlp", "--set=sweep.metric=validation/nothing", verb="sweep")


def test_the_place_of_the_run(work, caplog):
    with pytest.raises(UserError, match="--run: runs/x would be in the job's own folder"):
        Asked.of("train", ["digits-mlp", "--run=runs/x"]).refuse_a_place_that_goes({})
    Asked.of("train", ["digits-mlp"]).refuse_a_place_that_goes({"MANTA_STORAGE": "/shared"})
    assert not caplog.messages
    Asked.of("train", ["digits-mlp"]).refuse_a_place_that_goes({})
    assert "MANTA_STORAGE" in caplog.messages[0]


def test_the_environment_of_a_job(work):
    Path("own.env").write_text("# keys\nexport KEY='a=b'\n\nPLACE = there\n")
    Path("own.yaml").write_text("env_vars: {KEY: other, NUMBER: 3}\npip: [x]\n")
    found = environment_of("own.yaml", "own.env")
    assert found["pip"] == ["x"]
    kept = {name: found["env_vars"][name] for name in ("KEY", "PLACE", "NUMBER", "MANTA_JOB")}
    assert kept == {"KEY": "a=b", "PLACE": "there", "NUMBER": "3", "MANTA_JOB": "1"}
    for text in ("env_vars: [1]", "excludes: '*.log'", "excludes: [1]"):
        Path("wrong.yaml").write_text(text)
        with pytest.raises(UserError, match=r"wrong.yaml: (env_vars: not a mapping|excludes: not a list)"):
            environment_of("wrong.yaml", None)
    for text, message in (("[1]", "not the mapping"), ("working_dir: .", "leave it out"), ("a: [", "not valid YAML")):
        Path("wrong.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            environment_of("wrong.yaml", None)
    with pytest.raises(UserError, match="--env-file: none cannot be read"):
        environment_of(None, "none")
    with pytest.raises(UserError, match="'no' is not NAME=VALUE"):
        pairs(["no"], "--metadata")


def test_what_is_started(work):
    recipe("rows.parquet")
    (work / "old" / "model").mkdir(parents=True)
    for name in ("recipe.yaml", "environment.json"):
        (work / "old" / name).touch()
    asked, server = Asked.of("train", ["own.yaml", "--set", "model.hidden=[8, 4]", RUN]), Server({"CPU": 1})
    given = {"excludes": ["*.log"], "env_vars": {"A": "1"}}
    start("job-7", asked, bundle(work), server, given, {}, with_manta=False, python="python3")
    ((entrypoint, env),) = server.submitted
    assert entrypoint == f"python3 -P -m jobs train own.yaml --set 'model.hidden=[8, 4]' {RUN}"
    assert env == {"job": "job-7", "working_dir": str(work), "excludes": ["/old", "*.log"], "env_vars": {"A": "1"}}


def test_addresses(monkeypatch, caplog):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert _url("head:8265") == "http://head:8265"
    assert _url("https://head/ray/") == "https://head/ray"
    for wrong in ("ray://head:10001", "http://", "http://head:port"):
        with pytest.raises(UserError, match="is not that of a job server"):
            _url(wrong)
    with pytest.raises(UserError, match=r"--address: no job server is named; .* RAY_API_SERVER_ADDRESS"):
        _url(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert _url(None) == "http://other:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://server:8265")
    assert _url(None) == "http://server:8265"


def test_a_token_in_plain_http_is_warned_about(monkeypatch, caplog):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    for url in ("http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265", "https://head:8265"):
        _warn_of_plain_http(url)
    assert not caplog.messages
    _warn_of_plain_http("http://203.0.113.1:8265")
    assert "http://203.0.113.1:8265 the token, and all else, goes where others can read it" in caplog.text
