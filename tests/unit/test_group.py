"""Process groups listen where their node's address is, whatever the host's name leads to."""

import ipaddress
import json
import multiprocessing
import os
import socket

import psutil
import pytest
import torch
from torch import distributed

from cluster.group import LOOPBACK, interface_of, join, leave, listen_at

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back whatever the test does
        monkeypatch.delenv(name)


def addresses() -> list[str]:
    """This machine's, but for those that are good on one link only."""
    found = [a.address for all_of in psutil.net_if_addrs().values() for a in all_of if a.family == socket.AF_INET]
    return [address for address in found if not ipaddress.ip_address(address).is_link_local]


def test_the_interface_of_an_address_is_found():
    assert interface_of(LOOPBACK) == "lo"
    assert interface_of("203.0.113.77") is None  # of nobody: kept for documentation
    for address in addresses():
        assert interface_of(address) in psutil.net_if_addrs()


def test_users_settings_stay_but_for_what_is_this_machines_alone(monkeypatch):
    address = addresses()[-1]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "theirs")
    listen_at(address)
    if address != LOOPBACK:
        assert os.environ["NCCL_SOCKET_IFNAME"] == "theirs"
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface_of(address)
    listen_at(LOOPBACK)
    assert [os.environ[name] for name in VARIABLES] == ["lo", "=lo"]


def test_an_address_of_no_interface_leaves_everything_to_the_libraries():
    listen_at("203.0.113.77")
    assert not any(name in os.environ for name in VARIABLES)


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def peer(rank: int, address: str, port: int, told) -> None:
    before = listening()  # a fork holds its parent's sockets too, such as a Ray driver's
    listen_at(address)
    join(f"tcp://{address}:{port}", rank, world_size=2, timeout_s=60)
    distributed.all_reduce(torch.ones(1))
    told.put(json.dumps([ip for ip, listens in listening() - before if listens != port]))
    distributed.barrier()
    leave()


@pytest.mark.parametrize("address", addresses())
def test_gloo_listens_at_the_nodes_address_and_nowhere_else(address):
    """On a host whose name resolves to loopback it would listen there, where no other host reaches it."""
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    peers = [context.Process(target=peer, args=(rank, address, port, told)) for rank in range(2)]
    for process in peers:
        process.start()
    found = [json.loads(told.get()) for _ in peers]
    for process in peers:
        process.join()
    assert [process.exitcode for process in peers] == [0, 0]
    assert all(set(own) == {address} for own in found), found
