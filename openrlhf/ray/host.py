"""One Ray actor that hosts one worker: it becomes a rank, builds the worker, and passes calls on to it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray

from openrlhf.errors import InfraError
from openrlhf.ray.buckets import pack
from openrlhf.strategy import signals

NOSET_VARIABLES = tuple(
    f"RAY_EXPERIMENTAL_NOSET_{name}"
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ASCEND_RT_VISIBLE_DEVICES",
        "HABANA_VISIBLE_MODULES",
        "NEURON_RT_VISIBLE_CORES",
        "TPU_VISIBLE_CHIPS",
        "ONEAPI_DEVICE_SELECTOR",
    )
)


def ray_noset_visible_devices(environment: dict[str, str] | None = None) -> bool:
    """Return whether Ray was told to leave the list of visible devices alone, so that a rank must pick its own."""
    environment = os.environ if environment is None else environment
    return any(environment.get(name, "").lower() not in ("", "0", "false") for name in NOSET_VARIABLES)


def build_worker(worker_class: Callable, config: Any, kwargs: dict[str, Any]) -> Any:
    """Start DeepSpeed in this rank and return ``worker_class(config, strategy, **kwargs)``."""
    from openrlhf.strategy.deepspeed import DeepSpeedStrategy

    strategy = DeepSpeedStrategy(
        config.deepspeed,
        bf16=config.model.bf16,
        max_norm=config.optim.max_norm,
        micro_batch_size=config.batch.micro_train_batch_size,
        seed=config.batch.seed,
        ring_size=config.attention.ring_attn_size,
        ring_head_stride=config.attention.ring_head_stride,
    )
    strategy.setup_distributed()
    return worker_class(config, strategy, **kwargs)


HEADWAY_BYTES = 8 * 2**20
DRIVER = "the driver"
"""Who asks a worker to stop."""


class Sign(NamedTuple):
    """A sign of life: the process, what changes while it gets on with a call (None between calls), its bytes."""

    pid: int
    headway: tuple[int, Any] | None
    memory: int


def work_done(clock: int) -> tuple[float, int]:
    """Return the processor seconds of a thread, by its ``clock``, and what this process has read and written.

    Bytes count in steps of ``HEADWAY_BYTES``, so that answering pings is no headway.
    """
    moved = 0
    with suppress(OSError):
        counters = dict(line.split(b": ") for line in Path("/proc/self/io").read_bytes().splitlines())
        moved = int(counters[b"rchar"]) + int(counters[b"wchar"])
    return time.clock_gettime(clock), moved // HEADWAY_BYTES


def work_of_children() -> int:
    """Return the whole processor seconds of all processes below this one."""
    ticks = 0
    for process in signals.descendants(os.getpid()):
        with suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks // os.sysconf("SC_CLK_TCK")


class Pulse:
    """Shows other threads of an actor whether the thread that answers its calls still gets anywhere.

    The measure is the processor time of that thread, and the bytes that the process reads and writes, because other
    threads may fetch a model meanwhile: both stand still where the thread waits for something that does not come. (A
    collective that spins instead ends by its own timeout.)
    """

    def __init__(self) -> None:
        self._calls = 0
        self._progress: Callable[[], Any] | None = None

    @contextmanager
    def during_call(self, progress: Callable[[], Any] | None = None) -> Iterator[None]:
        """Show headway while the block runs; what ``progress`` returns counts too."""
        self._calls += 1
        clock = time.pthread_getcpuclockid(threading.get_ident())
        self._progress = lambda: (work_done(clock), progress() if progress else None)
        try:
            yield
        finally:
            self._progress = None

    def sign(self) -> Sign:
        """Return how this process is."""
        progress = self._progress
        return Sign(os.getpid(), None if progress is None else (self._calls, progress()), _memory())


def _memory() -> int:
    """Return the bytes of main memory that this process holds."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@ray.remote(concurrency_groups={"ping": 1})
class WorkerHost:
    """Rank ``rank`` of ``world_size``. Calls run one after the other; ``ping`` answers beside them."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        self.worker: Any = None
        self.pulse = Pulse()

    def address(self) -> tuple[str, int]:
        """Open the store where the ranks of the group meet, and return its address."""
        from openrlhf.strategy.rendezvous import open_store

        node = ray.util.get_node_ip_address()
        self.store, port = open_store(node)
        return node, port

    def setup(self, build: Callable, arguments: tuple, master: tuple[str, int]) -> None:
        """Take this rank's place in the group and keep ``build(*arguments)`` as the worker."""
        os.environ.update(self._rank_environment(master))
        with self.pulse.during_call():
            self.worker = build(*arguments)

    def call(self, name: str, columns: int, items: int, each: bool, /, *flat: Any, **common: Any) -> Any:
        """Call the worker's method ``name`` with ``columns`` lists of ``items`` entries, which come in ``flat``.

        Entries that were futures arrive as values because they are arguments of their own. ``each``: the method
        answers one result an item; they become one object of Ray each.
        """
        slices = [list(flat[column * items : (column + 1) * items]) for column in range(columns)]
        with self.pulse.during_call():
            result = getattr(self.worker, name)(*slices, **common)
        if not each:
            return result
        if len(result) != items:
            raise InfraError(f"{name} of {type(self.worker).__name__} gave {len(result)} results for {items} items.")
        return result[0] if items == 1 else tuple(result)

    def publish_weights(self, bucket_bytes: int) -> list[ray.ObjectRef]:
        """Put the policy's weights in the object store, bucket by bucket; all ranks help, rank 0 has references."""
        with self.pulse.during_call():
            buckets: Iterator[Any] = self.worker.weight_buckets(bucket_bytes)
            if self.rank == 0:
                return [ray.put(pack(bucket)) for bucket in buckets]
            for _ in buckets:
                pass
            return []

    @ray.method(concurrency_group="ping")
    def ping(self) -> Sign:
        """Return a sign of life."""
        return self.pulse.sign()

    @ray.method(concurrency_group="ping")
    def drop(self) -> None:
        """Give up a rollout that is under way: the run is being stopped."""
        signals.ask(DRIVER)

    def _rank_environment(self, master: tuple[str, int]) -> dict[str, str]:
        local_rank = 0
        if ray_noset_visible_devices():
            local_rank = int(next(iter(ray.get_gpu_ids()), 0))
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": master[0],
            "MASTER_PORT": str(master[1]),
            # To torch: the store is there, no rank opens it.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
