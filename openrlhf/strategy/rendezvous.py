"""How the ranks of a run find each other, and on which addresses they listen while they do.

Torch's own store and gloo listen on every address of the machine. Whoever reaches them can run code in the ranks, so
ranks that are all on this machine meet on its loopback, and others on ``MASTER_ADDR`` alone.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address

import torch.distributed as dist

from openrlhf import device as machine
from openrlhf.errors import InfraError


def join(timeout: timedelta) -> None:
    """Join the ranks that the environment describes (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``).

    Raises:
        InfraError: the others did not show up in time, or the port is in use.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if _is_loopback(host):
        machine.stay_on_loopback()
    try:
        store = _store(host, port, rank, world_size, timeout)
        dist.init_process_group(machine.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        if "eaddrinuse" in str(error).lower():
            raise InfraError(
                f"port {host}:{port} is in use, by another run perhaps: give the launcher another --master_port"
            ) from error
        raise InfraError(
            f"rank {rank} of {world_size} could not join the others at {host}:{port} within "
            f"{timeout.total_seconds():g} s (--collective_timeout): {error}"
        ) from error


def join_alone(timeout: timedelta) -> None:
    """Become the only rank, with a store inside the process: no port to find, nothing to connect to."""
    machine.stay_on_loopback()
    dist.init_process_group(machine.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _store(host: str, port: int, rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """Return the store through which the ranks meet; None where ``torchrun`` holds it.

    Rank 0 listens on ``host`` alone. It listens everywhere where ``host`` is a name, which other machines may know by
    another address, or is no address of this machine.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    listener = _listener(host, port) if rank == 0 and _address(host) else None
    bound = {} if listener is None else {"master_listen_fd": listener.detach()}
    return dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout, **bound)


def _listener(host: str, port: int) -> socket.socket | None:
    """Return a socket that listens on ``host``, or None when it cannot."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        return None
    return listener


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_loopback


def _address(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that ``host`` is; None for a name."""
    try:
        return ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None
