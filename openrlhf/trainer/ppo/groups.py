"""Groups of workers that hold one role. The loop talks to a group the same way wherever its workers live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


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


class LocalGroup:
    """One worker in this process; calls happen at once, so a future is the value itself."""

    size = 1

    def __init__(self, worker: Any):
        self.worker = worker

    def map(self, method: Callable, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Call the worker with all items."""
        return method(self.worker, *[list(column) for column in columns], **common)

    def run(self, method: Callable, *columns: Sequence[Any], **common: Any) -> list[Any]:
        """Call the worker with all items; its one result is the list's only element."""
        return [method(self.worker, *[list(column) for column in columns], **common)]

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Return the values, which are there already."""
        return list(futures)


def deal(items: Sequence[Any], parts: int) -> list[list[Any]]:
    """Return ``items`` cut into ``parts`` contiguous lists whose lengths differ by one at most."""
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
