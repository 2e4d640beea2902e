"""Who keeps the others waiting: every rank tells the key-value store each second that it lives and where it is."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

EVERY_S = 1.0
LISTEN_S = 2.5
"""How long a rank listens for the others before it calls them silent."""
GIVEN_UP = "given up"


class Heartbeat:
    """The sign of life of this rank and the ears for those of the others.

    ``store`` is used through a connection of its own, because a wait on the ranks' common one blocks it.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self._store = store.clone()
        self._beats, self._calls, self._where = 0, 0, "the start"
        self._stopped = threading.Event()
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
            return f"{_named(silent)}: no sign of life for {LISTEN_S:g} s (killed, stopped, or its machine is gone)"
        behind = {rank: where for rank, (_, calls, where) in after.items() if calls < own_calls and rank not in left}
        if behind:
            return "; ".join(
                f"rank {rank} lives but has not come here from {where!r}" for rank, where in behind.items()
            )
        return "all other ranks live: look at the network between them"

    def _beat(self) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self._write()
            except (dist.DistError, RuntimeError):
                return

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


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
