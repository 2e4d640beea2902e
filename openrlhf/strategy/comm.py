"""How the processes of a run talk: a small interface, alone or over torch.distributed, where every wait has a
deadline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

from openrlhf.errors import InfraError, UsageError
from openrlhf.strategy.barrier import Barriers
from openrlhf.strategy.heartbeat import Heartbeat

OPERATIONS = ("sum", "max", "mean")


class Comm(Protocol):
    """The ranks of one group of processes. Every method but the attributes must be called by all of them."""

    rank: int
    world_size: int

    def all_reduce(self, value: torch.Tensor | float, op: str = "sum") -> torch.Tensor | float:
        """Return ``value`` combined over the ranks by ``op`` (``sum``, ``max`` or ``mean``); a new
        tensor, or a float.
        """

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, in rank order."""

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Return the ``value`` of rank ``src``."""

    def barrier(self, label: str, timeout_s: float | None = None) -> None:
        """Wait for all ranks. Raises ``InfraError`` that names ``label`` when one is missing after ``timeout_s``, or
        is gone before.
        """

    def waiting(self, what: str, timeout_s: float | None = None) -> AbstractContextManager:
        """Return the context of a library's collectives: ``timeout_s`` is their deadline, and a failure becomes an
        ``InfraError`` that says who is missing in ``what``.
        """

    def close(self) -> None:
        """Leave the others in good order."""


def _check_operation(op: str) -> None:
    if op not in OPERATIONS:
        raise UsageError(f"all_reduce knows {', '.join(OPERATIONS)}, not {op!r}")


class SoloComm:
    """One process: everything is the identity."""

    rank = 0
    world_size = 1

    def all_reduce(self, value: torch.Tensor | float, op: str = "sum") -> torch.Tensor | float:
        """Return ``value``: a copy of a tensor, or a float."""
        _check_operation(op)
        return value.clone() if isinstance(value, torch.Tensor) else float(value)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return ``[value]``."""
        return [value]

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Return ``value``."""
        return value

    def barrier(self, label: str, timeout_s: float | None = None) -> None:
        """Return at once."""

    def waiting(self, what: str, timeout_s: float | None = None) -> AbstractContextManager:
        """Return a context that does nothing."""
        return nullcontext()

    def close(self) -> None:
        """Do nothing: there are no others."""


class TorchComm:
    """The default process group of torch.distributed.

    Tensors travel over that group (NCCL or gloo), numbers and objects over a gloo group of its own. A barrier goes
    through the key-value store that the ranks met at: so it may have a deadline of its own, and it can say who is
    missing. ``timeout_s`` is the deadline of every wait that has no other, in seconds.
    """

    _made = 0

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        store = dist.PrefixStore(f"openrlhf/{TorchComm._made}", _get_default_store())
        self._heartbeat = Heartbeat(store, self.rank, self.world_size)
        self._barriers = Barriers(store, self._heartbeat)
        TorchComm._made += 1

    def all_reduce(self, value: torch.Tensor | float, op: str = "sum") -> torch.Tensor | float:
        """Return ``value`` combined over the ranks; a float takes part in double precision. Raises ``InfraError``."""
        _check_operation(op)
        is_tensor = isinstance(value, torch.Tensor)
        total = value.clone() if is_tensor else torch.tensor(float(value), dtype=torch.float64)
        with self.waiting(f"all_reduce({op})"):
            reduction = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
            dist.all_reduce(total, op=reduction, group=None if is_tensor else self._control)
        if op == "mean":
            total = total / self.world_size
        return total if is_tensor else total.item()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the picklable ``value`` of every rank, in rank order. Raises ``InfraError``."""
        values: list[Any] = [None] * self.world_size
        with self.waiting("all_gather_object"):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Return the picklable ``value`` of rank ``src``. Raises ``InfraError``."""
        box = [value]
        with self.waiting(f"broadcast_object from rank {src}"):
            dist.broadcast_object_list(box, src=src, group=self._control)
        return box[0]

    def barrier(self, label: str, timeout_s: float | None = None) -> None:
        """Wait for all ranks, ``timeout_s`` seconds at most; see :meth:`Barriers.wait`."""
        self._barriers.wait(label, timeout_s or self.timeout_s)

    @contextmanager
    def waiting(self, what: str, timeout_s: float | None = None) -> Iterator[None]:
        """Turn the failure of a collective inside into an ``InfraError`` that says who is missing."""
        limit = timeout_s or self.timeout_s
        self._heartbeat.enter(what)
        if limit != self.timeout_s:
            limit_groups(limit)
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            raise InfraError(
                f"rank {self.rank} of {self.world_size} gave up in {what} (deadline {limit:g} s, "
                f"--collective_timeout): {self._heartbeat.explain()}"
            ) from error
        finally:
            if limit != self.timeout_s:
                limit_groups(self.timeout_s)

    def close(self) -> None:
        """Send no sign of life any more."""
        self._heartbeat.stop()


def limit_groups(timeout_s: float) -> None:
    """Give every process group the deadline ``timeout_s``, those that libraries made for themselves too."""
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=timeout_s), group)
