"""Groups of workers that hold one role. The loop talks to a group the same way wherever its workers live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from openrlhf.errors import Preempted
from openrlhf.strategy import signals
from openrlhf.strategy.comm import Comm, SoloComm


class WorkerGroup(Protocol):
    """Workers of one role. ``K`` items are dealt in contiguous slices, ``K / size`` to each worker.

    Items may be futures of an earlier call: they are handed over without passing through the caller.
    """

    size: int

    def map(self, method: Callable, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Call ``method(worker, *slices, **common)`` once a worker; it returns one result an item.
        Return K futures.
        """
        ...

    def run(self, method: Callable, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Like :meth:`map`, but each worker returns one result. Return ``size`` futures."""
        ...

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Return the values of futures, in order."""
        ...


@dataclass(frozen=True)
class Elsewhere:
    """What a rank knows of a value that another one made."""

    rank: int


class LocalGroup:
    """The worker of this process and its like in the other ranks of the program, which all make the same calls.

    Calls happen at once, each rank on its own slice: a future is the value itself where it was made, and
    :class:`Elsewhere` on the other ranks. All hear a value when they :meth:`get` it.
    """

    def __init__(self, worker: Any, comm: Comm | None = None):
        self.worker = worker
        self.comm = comm or SoloComm()

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.comm.world_size

    def map(self, method: Callable, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Call the worker with the items of this rank."""
        return self._futures(self._call(method, columns, common), len(columns[0]))

    def run(self, method: Callable, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Call the worker with the items of this rank; its one result is its only future."""
        return self._futures([self._call(method, columns, common)], self.comm.world_size)

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Return the values: those of this rank are there already.

        Nobody waits for methods that return nothing, because they may have failed on one rank.
        """
        if self.comm.world_size == 1:
            return list(futures)
        mine = [future for future in futures if not isinstance(future, Elsewhere)]
        if mine and all(value is None for value in mine):
            return [None] * len(futures)
        values = [iter(made) for made in self.comm.all_gather_object(mine)]
        return [next(values[self._maker(future)]) for future in futures]

    def _maker(self, future: Any) -> int:
        return future.rank if isinstance(future, Elsewhere) else self.comm.rank

    def _call(self, method: Callable, columns: Sequence[Sequence[Any]], common: dict[str, Any]) -> Any:
        """Return what the worker answers. Asked to stop, a rank drops its work, and leaves here with the others."""
        result = None
        with suppress(Preempted):
            result = method(self.worker, *[self._slice(column) for column in columns], **common)
        signals.check_together(self.comm, method.__name__)
        return result

    def _slice(self, column: Sequence[Any]) -> list[Any]:
        ranks = self.comm.world_size
        if len(column) % ranks:
            raise ValueError(f"{len(column)} items for {ranks} workers")
        return deal(column, ranks)[self.comm.rank]

    def _futures(self, values: list[Any], count: int) -> list[Any]:
        """Return ``count`` futures over all ranks, of which this one made ``values``."""
        ranks = self.comm.world_size
        share = count // ranks
        made = [values if rank == self.comm.rank else [Elsewhere(rank)] * share for rank in range(ranks)]
        return [future for part in made for future in part]


def deal(items: Sequence[Any], parts: int) -> list[list[Any]]:
    """Return ``items`` cut into ``parts`` contiguous lists whose lengths differ by one at most."""
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
