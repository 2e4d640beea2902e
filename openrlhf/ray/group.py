"""A group of workers on Ray: the same calls as :class:`~openrlhf.trainer.ppo.groups.LocalGroup`, answered by futures.

Values go from worker to worker through Ray's object store; the caller holds references. Every wait ends: with the
values, with the error of a worker, or because an actor is lost; see :class:`~openrlhf.ray.watch.Watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openrlhf.ray.host import WorkerHost, build_worker
from openrlhf.ray.slots import Slots
from openrlhf.ray.watch import Watch


class RayGroup:
    """The workers of one role, one Ray actor each; a :class:`~openrlhf.trainer.ppo.groups.WorkerGroup`."""

    def __init__(self, role: str, hosts: list[Any], watch: Watch):
        self.role = role
        self.hosts = hosts
        self.size = len(hosts)
        self.watch = watch
        for rank, host in enumerate(hosts):
            watch.add(host, f"{role} rank {rank}")

    @classmethod
    def start(cls, role: str, slots: Slots, watch: Watch) -> RayGroup:
        """Start one empty host on each of ``slots``; give them workers with :meth:`setup`."""
        size = len(slots.bundles)
        return cls(role, [start_actor(WorkerHost, slots, rank, rank, size) for rank in range(size)], watch)

    def setup(self, worker_class: Callable, config: Any, **kwargs: Any) -> list[Any]:
        """Build ``worker_class(config, strategy, **kwargs)`` in every rank; futures, so groups start together."""
        return self.build(build_worker, worker_class, config, kwargs)

    def build(self, factory: Callable, *arguments: Any) -> list[Any]:
        """Make ``factory(*arguments)`` the worker of every rank; return futures."""
        master = self.hosts[0].address.remote()
        return [host.setup.remote(factory, arguments, master) for host in self.hosts]

    def map(self, method: Callable | str, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Deal the items of ``columns`` to the workers in contiguous slices and return a future an item."""
        share = self._share(columns)
        if not share:
            return []
        futures: list[Any] = []
        for rank, host in enumerate(self.hosts):
            flat = [item for column in columns for item in column[rank * share : (rank + 1) * share]]
            call = host.call.options(num_returns=share)
            answer = call.remote(_name(method), len(columns), share, True, *flat, **common)
            futures += [answer] if share == 1 else answer
        return futures

    def run(self, method: Callable | str, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Like :meth:`map`, but each worker gives one result; without columns every worker is called."""
        share = self._share(columns)
        return [
            host.call.remote(
                _name(method),
                len(columns),
                share,
                False,
                *[item for column in columns for item in column[rank * share : (rank + 1) * share]],
                **common,
            )
            for rank, host in enumerate(self.hosts)
        ]

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Return the values of ``futures``; see :meth:`Watch.get`."""
        return self.watch.get(futures)

    def _share(self, columns: Sequence[Sequence[Any]]) -> int:
        """Return how many items of each column one worker gets."""
        lengths = {len(column) for column in columns}
        if len(lengths) > 1 or any(length % self.size for length in lengths):
            raise ValueError(f"{self.role}: columns of {sorted(lengths)} items for {self.size} workers")
        return lengths.pop() // self.size if lengths else 0


def start_actor(actor_class: Any, slots: Slots, index: int, *arguments: Any) -> Any:
    """Start a Ray actor on slot ``index``; it is never restarted, because a new one would have lost its state."""
    return actor_class.options(max_restarts=0, **slots.options(index)).remote(*arguments)


def _name(method: Callable | str) -> str:
    return method if isinstance(method, str) else method.__name__
