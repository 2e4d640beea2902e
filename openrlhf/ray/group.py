"""A group of workers on Ray: the same calls as :class:`~openrlhf.trainer.ppo.groups.LocalGroup`, answered by futures.

Values go from worker to worker through Ray's object store; the caller holds references. Every wait ends: with the
values, with the error of a worker, or because an actor died, no longer answers or hangs in a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from openrlhf.errors import InfraError, OpenRLHFError, Preempted
from openrlhf.ray.host import Sign, WorkerHost, build_worker
from openrlhf.ray.slots import Slots
from openrlhf.strategy import signals

LOOK_EVERY_S = 2.0
LISTEN_EVERY_S = 0.2
"""How soon a request to stop is heard in a wait."""


class Watch:
    """Waits for futures that some actors are to answer, and names the actor that keeps them from coming.

    Args:
        timeout_s: an actor that does not answer a ping for so long, or stands still in a call, is given up.
        look_every_s: seconds between two pings.
    """

    def __init__(self, timeout_s: float, look_every_s: float = LOOK_EVERY_S):
        self.timeout_s = timeout_s
        self.look_every_s = min(look_every_s, timeout_s)
        self._actors: dict[str, tuple[str, Any]] = {}
        self._headway: dict[str, tuple[Any, float]] = {}
        self._pings: dict[Any, tuple[str, float]] = {}
        self._looked = 0.0

    def add(self, actor: Any, name: str) -> None:
        """Watch ``actor``, called ``name`` in messages; its ``ping`` gives a
        :class:`~openrlhf.ray.host.Sign` beside its work, and its ``drop`` ends what can be dropped.
        """
        self._actors[actor._actor_id.hex()] = (name, actor)

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Return the values of ``futures``, in order.

        Raises:
            OpenRLHFError: what a worker raised; :class:`InfraError` when an actor died, does not answer or hangs;
                :class:`Preempted` when the run was asked to stop and may drop what it waits for here.
        """
        values: dict[Any, Any] = {}
        pending = list(dict.fromkeys(futures))
        self._forget_pings()
        while pending:
            self._listen()
            every = min(LISTEN_EVERY_S, self.look_every_s)
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=every, fetch_local=False)
            values.update(zip(done, self._fetch(done), strict=True))
            if pending:
                self._look()
        return [values[future] for future in futures]

    def _listen(self) -> None:
        """Leave the wait when the run was asked to stop and may leave it; the actors drop what they do, too."""
        try:
            signals.check()
        except Preempted:
            for _, actor in self._actors.values():
                actor.drop.remote()
            raise

    def _forget_pings(self) -> None:
        """Count the silence of an actor from now on: nobody listened to it between two waits."""
        self._pings.clear()
        self._looked = 0.0

    def _look(self) -> None:
        """Send a ping to every actor now and then, and read the answers to earlier ones.

        Raises:
            InfraError: one died, gave no sign of life for ``timeout_s`` seconds, or stood still in a call for so long.
        """
        now = time.monotonic()
        heard = ray.wait(list(self._pings), num_returns=len(self._pings), timeout=0)[0] if self._pings else []
        signs = zip(heard, self._fetch(heard), strict=True)
        self._look_for_headway({self._pings.pop(ping)[0]: sign for ping, sign in signs})
        silent = [name for name, sent in self._pings.values() if now - sent >= self.timeout_s]
        if silent:
            names = ", ".join(silent)
            raise InfraError(f"No sign of life from {names} for {self.timeout_s:.0f} s: stopped or hanging.")
        if now - self._looked >= self.look_every_s:
            self._looked, asked = now, {name for name, _ in self._pings.values()}
            for name, actor in self._actors.values():
                if name not in asked:
                    self._pings[actor.ping.remote()] = (name, now)

    def _look_for_headway(self, signs: dict[str, Sign]) -> None:
        """Compare with earlier signs; raise InfraError when an actor has been at the same point of a call too long."""
        now = time.monotonic()
        for name, sign in signs.items():
            before, since = self._headway.get(name, (None, now))
            self._headway[name] = (sign.headway, since if sign.headway == before else now)
        still = [name for name, (headway, since) in self._headway.items() if headway and now - since >= self.timeout_s]
        if still:
            raise InfraError(f"{', '.join(still)} made no headway for {self.timeout_s:.0f} s: the call hangs.")

    def _fetch(self, futures: list[Any]) -> list[Any]:
        try:
            return ray.get(futures, timeout=self.timeout_s)
        except RayError as error:
            told = self._translate(error)
            raise told from (None if isinstance(told, OpenRLHFError) else error)

    def _translate(self, error: BaseException) -> BaseException:
        """Return what really happened: the worker's own exception, or who died."""
        if isinstance(error, RayTaskError):
            return self._translate(error.cause)
        if isinstance(error, RayActorError):
            name, _ = self._actors.get(error.actor_id or "", ("A worker", None))
            return InfraError(f"{name} died. {_one_line(error)}")
        if isinstance(error, RayError):
            return InfraError(f"Ray failed: {_one_line(error)}")
        return error


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


def _one_line(error: BaseException) -> str:
    """Return Ray's message without its tables and line breaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return " ".join(lines)[:600]
