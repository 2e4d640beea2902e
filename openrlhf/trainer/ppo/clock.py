"""How long the phases of a rollout step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from openrlhf.trainer.console import OURS


class PhaseClock:
    """Adds up the seconds of each phase of a rollout step, and says in the log which one begins."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self._began, self._seconds = time.perf_counter(), {}

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Count the block as phase ``name``; ``step`` is the one that was done last."""
        OURS.debug("phase: %s, after step %d", name, step)
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def times(self) -> dict[str, float]:
        """Return the seconds of each phase since the step began, and of all of it."""
        phases = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return {**phases, "time/step": time.perf_counter() - self._began}
