"""Barriers at the key-value store where the ranks met: each has a deadline of its own and can say who is missing."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

from openrlhf.errors import InfraError
from openrlhf.strategy.heartbeat import Heartbeat

LOOK_EVERY_S = 5.0
"""How often a rank that waits looks whether those it waits for still live."""
SHORTEST_WAIT_S = 0.01


class Barriers:
    """The barriers of this rank, one after the other; all ranks call :meth:`wait` equally often."""

    def __init__(self, store: dist.Store, heartbeat: Heartbeat):
        self._store, self._heartbeat = store, heartbeat
        self.rank, self.world_size = heartbeat.rank, heartbeat.world_size
        self._passed = 0

    def wait(self, label: str, limit_s: float) -> None:
        """Wait for all ranks, ``limit_s`` seconds at most.

        Raises ``InfraError`` that names ``label`` and the missing ranks, at the deadline or when one of them is gone.
        """
        ended: list[InfraError | None] = []

        def meet() -> None:
            try:
                ended.append(self._meet(label, limit_s))
            except InfraError as error:
                ended.append(error)
            except RuntimeError as error:  # a DistError, or a store that ends with its process
                ended.append(
                    InfraError(f"{self._here(label)} for rank 0, where the ranks meet, which is gone: {error}")
                )

        # A store whose process has stopped would keep its callers for ever.
        meeting = threading.Thread(target=meet, name="barrier", daemon=True)
        meeting.start()
        meeting.join(limit_s + 2 * LOOK_EVERY_S)
        if not ended:
            raise InfraError(f"{self._here(label)} for rank 0, where the ranks meet, which does not answer")
        if ended[0]:
            raise ended[0]

    def _meet(self, label: str, limit_s: float) -> None:
        began, waited = time.monotonic(), 0.0
        keys = [f"{self._passed}/{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], label)
        while missing := self._missing(keys, max(SHORTEST_WAIT_S, min(LOOK_EVERY_S, limit_s - waited))):
            waited = time.monotonic() - began
            gone = self._heartbeat.gone(missing)
            if gone:
                raise InfraError(f"{self._here(label, waited)} for {gone}")
            if waited >= limit_s:
                who = f"ranks {missing} of {self.world_size}"
                raise InfraError(f"{self._here(label, waited)} for {who} (--collective_timeout)")
        # Everyone has passed the barrier before this one.
        self._store.delete_key(f"{self._passed - 1}/{self.rank}")
        self._passed += 1

    def _missing(self, keys: list[str], seconds: float) -> list[int]:
        """Wait ``seconds`` at most and return the ranks that have not come; ``DistError`` when the store is gone."""
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except dist.DistError:
            return [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        return []

    def _here(self, label: str, seconds: float | None = None) -> str:
        span = "" if seconds is None else f" {seconds:.0f} s"
        return f"rank {self.rank} waited{span} at the barrier {label!r}"
