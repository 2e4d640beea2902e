"""What this machine is: device, collective backend, thread counts, random state. The only file that asks."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}


def device_type() -> str:
    """Return ``"cuda"`` when a GPU is visible, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def visible_devices() -> int:
    """Return the number of GPUs that this process sees; 1 without any."""
    import torch

    return max(1, torch.cuda.device_count())


def gpu_present() -> bool:
    """Return whether this machine shows a GPU driver; asked where torch may not be imported yet."""
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def backend() -> str:
    """Return the torch.distributed backend of this machine: ``"nccl"`` or ``"gloo"``."""
    return "nccl" if device_type() == "cuda" else "gloo"


def current_device(local_rank: int = 0):
    """Return the ``torch.device`` of this process and make it the current one."""
    import torch

    if device_type() == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def cores() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_environment(processes: int) -> dict[str, str]:
    """Return the environment that gives each of ``processes`` busy processes its share of the cores.

    Threads wait passively: two spinning OpenMP pools on the same cores are many times slower than one.
    """
    return {"OMP_NUM_THREADS": str(max(1, cores() // max(1, processes))), **PASSIVE_WAITING}


def configure_threads(processes: int | None = None) -> None:
    """Set the thread count of this process; call it before torch is imported.

    ``processes`` defaults to the ranks that the launcher started on this machine. An ``OMP_NUM_THREADS`` set by the
    user wins.
    """
    if processes is None:
        processes = int(
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE") or 1
        )
    for name, value in thread_environment(processes).items():
        os.environ.setdefault(name, value)


def stay_on_loopback() -> None:
    """Keep what gloo and vLLM listen on inside this machine; call it where no other machine takes part in the run.

    A ``GLOO_SOCKET_IFNAME`` or ``VLLM_HOST_IP`` set by the user wins.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator, loadable with ``torch.load(weights_only=True)``.

    Of the GPUs only the current one counts, and only in a process that uses it: asking would start CUDA elsewhere.
    """
    import numpy
    import torch

    name, keys, position, has_gauss, cached = numpy.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    import numpy
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def memory_metrics() -> dict[str, float]:
    """Return the most GPU memory that this process has held so far, in GiB, as a metric; nothing on a CPU."""
    import torch

    if device_type() == "cpu":
        return {}
    return {"memory/peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def empty_cache() -> None:
    """Give cached GPU memory back to the driver; does nothing on a CPU."""
    import torch

    if device_type() == "cuda":
        torch.cuda.empty_cache()


def why_unreachable(url: str, timeout_s: float = 5.0) -> str:
    """Return why no connection to ``url`` can be made, ``""`` when one can; behind a proxy it is not tried."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if getproxies():
        return ""
    place = urlsplit(url)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), timeout=timeout_s).close()
    except OSError as error:
        return str(error)
    return ""
