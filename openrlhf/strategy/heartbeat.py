"""Who keeps the others waiting: every rank tells the key-value store each second that it lives and where it is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

EVERY_S = 1.0
LISTEN_S = 2.5
"""How long a rank listens for the others before it calls them silent."""
SILENT_S = 300.0
"""After how long a rank that others wait for is given up although nobody saw it end.

A library that writes a large file may keep every thread of its process waiting, the one that gives the signs too.
"""
GIVEN_UP = "given up"
WHY_SILENT = "(killed, stopped, or its machine is gone)"


class Heartbeat:
    """The sign of life of this rank and the ears for those of the others.

    ``store`` is used through a connection of its own, because a wait on the ranks' common one blocks it.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self._store = store.clone()
        self._beats, self._calls, self._where = 0, 0, "the start"
        self._heard: dict[int, tuple[int, float]] = {}
        self._stopped = threading.Event()
        self._store.set(f"process/{rank}", f"{here()} {os.getpid()}")
        self._write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def enter(self, what: str) -> None:
        """Note that this rank begins its next wait for the others."""
        self._calls, self._where = self._calls + 1, what

    def stop(self) -> None:
        """Say nothing any more: this rank leaves in good order."""
        self._stopped.set()

    def explain(self) -> str:
        """Say after a wait that failed who is missing or behind; takes three seconds at most.

        This rank does not wait for anybody afterwards, and the others hear so.
        """
        own_calls, self._where = self._calls, GIVEN_UP
        answer: list[str] = []
        asking = threading.Thread(target=lambda: answer.append(self._ask(own_calls)), daemon=True)
        asking.start()
        asking.join(LISTEN_S + 0.5)
        return answer[0] if answer else "rank 0, where the ranks meet, does not answer: it has stopped"

    def gone(self, ranks: Sequence[int]) -> str:
        """Say which of ``ranks``, which keep this one waiting, do not come any more; ``""`` while all may.

        Asked again and again: on this machine a rank that falls silent is gone with its process, on another one after
        ``SILENT_S`` seconds.
        """
        now, found = time.monotonic(), []
        try:
            beats = self._read()
            for rank in ranks:
                before, since = self._heard.get(rank, (-1, now))
                self._heard[rank] = (beats[rank][0], since if beats[rank][0] == before else now)
                silence = now - self._heard[rank][1]
                if silence >= SILENT_S or (silence >= LISTEN_S and self._has_ended(rank)):
                    found.append(rank)
        except (dist.DistError, RuntimeError):
            return "rank 0, where the ranks meet, is gone"
        return f"{_named(found)}: no sign of life {WHY_SILENT}" if found else ""

    def _has_ended(self, rank: int) -> bool:
        """Return whether the process of ``rank`` was on this machine and is no more."""
        machine, _, process = self._store.get(f"process/{rank}").decode().rpartition(" ")
        return bool(machine) and machine == here() and not _runs(int(process))

    def _ask(self, own_calls: int) -> str:
        try:
            before = self._read()
            time.sleep(LISTEN_S)
            after = self._read()
        except (dist.DistError, RuntimeError):
            return "rank 0, where the ranks meet, is gone"
        left = {rank for rank, (_, _, where) in after.items() if where == GIVEN_UP}
        silent = [rank for rank in after if after[rank] == before[rank] and rank not in left | {self.rank}]
        if silent:
            return f"{_named(silent)}: no sign of life for {LISTEN_S:g} s {WHY_SILENT}"
        behind = {rank: where for rank, (_, calls, where) in after.items() if calls < own_calls and rank not in left}
        if behind:
            return "; ".join(
                f"rank {rank} lives but has not come here from {where!r}" for rank, where in behind.items()
            )
        return "all other ranks live: look at the network between them"

    def _beat(self) -> None:
        while not self._stopped.wait(EVERY_S):
            with suppress(dist.DistError, RuntimeError):
                self._write()

    def _write(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", f"{self._beats}|{self._calls}|{self._where}")

    def _read(self) -> dict[int, tuple[int, int, str]]:
        found = {}
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            text = self._store.get(key).decode() if self._store.check([key]) else "0|0|the start"
            beats, calls, where = text.split("|", 2)
            found[rank] = (int(beats), int(calls), where)
        return found


def here() -> str:
    """Return a name of this machine, as far as process numbers mean the same; ``""`` where there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _runs(process: int) -> bool:
    """Return whether there is a process of that number that has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
