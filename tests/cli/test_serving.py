"""`manta serve`, where it cannot serve: one message, exit code 2, nothing started."""

import socket
from contextlib import closing

import pytest

import cluster


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    few = {"train.epochs": 1, "train.global_batch_size": 512}
    return cluster.train("digits-mlp", overrides=few, run=str(folder)).run


def test_a_port_in_use(refused, run):
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        assert refused("serve", run, "--port", port) == (
            f"--port: 127.0.0.1:{port} cannot be had (Address already in use); choose another"
        )


def test_a_port_that_another_server_shares(refused, run):
    """As `manta serve` does with its own replicas."""
    with closing(socket.socket()) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "Address already in use" in refused("serve", run, "--port", other.getsockname()[1])


def test_what_is_no_run_and_a_run_without_a_model(refused, tmp_path):
    assert "nowhere" in refused("serve", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("serve", tmp_path / "empty")


@pytest.mark.parametrize("host", ["example.org", "300.1.1.1", "", "127.0.0.1:80"])
def test_what_is_no_address(refused, run, host):
    assert refused("serve", run, "--host", host).startswith(f"--host: {host!r} is no address; give one")


def test_an_address_of_another_machine(refused, run):
    message = refused("serve", run, "--host", "192.0.2.1", "--port", 0)  # TEST-NET-1 of RFC 5737
    assert message.startswith("--host: 192.0.2.1:0 cannot be had (")


def test_a_token_that_can_be_guessed(refused, run, monkeypatch):
    monkeypatch.setenv("MANTA_SERVE_TOKEN", "short")
    assert refused("serve", run) == "MANTA_SERVE_TOKEN: a token of 5 characters; choose one of at least 16"


def test_a_missing_package(refused, run, monkeypatch):
    monkeypatch.setattr("cluster.inference.serving.find_spec", lambda name: None if name == "uvicorn" else name)
    message = "serve: needs uvicorn, which is not installed; pip install 'manta-train[serve]'"
    assert refused("serve", run) == message


def test_more_replicas_than_can_be(refused, run):
    assert "--replicas" in refused("serve", run, "--replicas", 1000)
