"""Which cluster is used: that of --address, else that of RAY_ADDRESS, as inside a Ray job; and what is refused."""

import json
import logging
import socket
import tempfile
from contextlib import closing

import pytest

import cluster
from cluster.recipe.loading import load_recipe
from cluster.runtime.existing import JOB_SETTINGS, Existing, existing, refuse_no_node, refuse_temporary
from cluster.storage import Folder
from cluster.training.run_directory import new_place
from nn_models.errors import UserError

FAST = {"train.epochs": 1}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("RAY_ADDRESS", "MANTA_STORAGE", JOB_SETTINGS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def answering(monkeypatch):
    monkeypatch.setattr("cluster.runtime.existing.knock", lambda found: None)


def test_the_option_comes_before_the_variable(monkeypatch, answering):
    assert existing(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert existing(None) == Existing("10.0.0.1:6379", "RAY_ADDRESS")
    assert existing("10.0.0.2:6379") == Existing("10.0.0.2:6379", "--address")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert existing(None) is None


def test_the_first_line_says_which(monkeypatch, answering, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv(JOB_SETTINGS, json.dumps({"metadata": {"job_submission_id": "raysubmit_7"}}))
    existing(None)
    assert caplog.messages == ["using the Ray cluster at 10.0.0.1:6379 (RAY_ADDRESS, in the job raysubmit_7)"]


def test_a_run_in_this_process_says_that_the_cluster_is_not_used(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")  # no driver could use it
    cluster.train("digits-mlp", overrides=FAST, run=str(tmp_path / "run"))
    assert caplog.messages[0].startswith("training in this process (--workers 0): the Ray cluster at http://10.0.0.1")


@pytest.mark.parametrize(("where", "what"), [("ray://h:10001", "the Ray client"), ("http://h:8265", "a job server")])
def test_an_address_that_no_driver_can_use_is_refused(where, what):
    with pytest.raises(UserError, match=f"{where}: {what} cannot drive training; .* use `manta submit`"):
        existing(where)


def test_a_variable_that_leads_nowhere_is_named(monkeypatch, tmp_path):
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(UserError, match=f"RAY_ADDRESS: {nobody}: no Ray cluster answers there .* unset RAY_ADDRESS"):
        cluster.train("digits-mlp", num_workers=1, run=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_machine_that_is_no_node_is_told_to_submit(tmp_path):
    there = Existing("203.0.113.1:6379", "--address")  # RFC 5737: nobody has such addresses
    with pytest.raises(
        UserError, match=r"this machine is no node .*203\.0\.113\.2.*manta submit … --address http://203"
    ):
        refuse_no_node(there, {"203.0.113.1": str(tmp_path / "no"), "203.0.113.2": ""})
    refuse_no_node(there, {"203.0.113.1": "", "127.0.0.1": ""})
    with socket.socket(socket.AF_UNIX) as raylet, tempfile.TemporaryDirectory(dir="/tmp") as place:
        raylet.bind(f"{place}/raylet")
        raylet.listen()
        refuse_no_node(there, {"203.0.113.1": f"{place}/raylet"})  # behind a translation of addresses


def test_a_run_in_rays_temporary_folder_is_refused(monkeypatch, tmp_path):
    job = tmp_path / "session_2026-01-01_00-00-00_000000_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(UserError, match=r"--run: .*Ray's temporary folder.*or set MANTA_STORAGE"):
        cluster.train("digits-mlp", overrides=FAST)
    with pytest.raises(UserError, match=r"--run: .*Ray's temporary folder.*or set MANTA_STORAGE"):
        cluster.sweep("digits-mlp", run="sweep")
    assert list(job.iterdir()) == []
    refuse_temporary(Folder(tmp_path))
    monkeypatch.setenv("MANTA_STORAGE", str(tmp_path / "shared"))
    outcome = cluster.train("digits-mlp", overrides=FAST)
    assert outcome.run.startswith(str(tmp_path / "shared" / "runs" / "digits-mlp-"))


def test_new_places_at_a_uri(monkeypatch, tmp_path):
    monkeypatch.setenv("MANTA_STORAGE", f"file://{tmp_path}/shared")
    with new_place("runs", load_recipe("digits-mlp")) as place:
        assert place.startswith(f"file://{tmp_path}/shared/runs/digits-mlp-")
