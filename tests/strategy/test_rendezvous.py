"""Where ranks meet: on the address they were given and no other, and a port that is taken is named."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from openrlhf.errors import InfraError
from openrlhf.strategy import rendezvous


@pytest.fixture
def launched(monkeypatch):
    """The environment of rank 0 of two, whose port is taken; the value is the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        names = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in {**names, "GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        yield port


def test_a_port_that_is_in_use_is_named_with_the_flag_to_set(launched):
    with pytest.raises(InfraError, match=f"port 127.0.0.1:{launched} is in use.*--master_port"):
        rendezvous.join(timedelta(seconds=5))


def test_the_others_are_missed_by_a_deadline(monkeypatch, launched):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    with pytest.raises(InfraError, match="rank 0 of 2 could not join the others at 127.0.0.1:.* within 1 s"):
        rendezvous.join(timedelta(seconds=1))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("192.0.2.1", False), ("node-0", False)],
)
def test_only_addresses_of_the_loopback_count_as_one_machine(host, loopback):
    assert rendezvous._is_loopback(host) is loopback


def test_a_listener_takes_connections_on_its_address_alone():
    listener = rendezvous._listener("127.0.0.1", 0)
    assert listener.getsockname()[0] == "127.0.0.1"
    listener.close()
    assert rendezvous._listener("192.0.2.77", 0) is None
