"""Waits for actors of Ray, and sees while it waits when one of them died, no longer answers, or hangs in a call.

An actor that nobody could replace ends the wait with an error that names it. Of one that somebody replaces, that one
is told, and the wait goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from openrlhf.errors import InfraError, OpenRLHFError, Preempted
from openrlhf.ray.host import Sign
from openrlhf.ray.obituary import how_it_died, one_line
from openrlhf.strategy import signals

LOG = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0
LISTEN_EVERY_S = 0.2
"""How soon a request to stop is heard in a wait."""


@dataclass(eq=False)
class Watched:
    """An actor that is watched.

    Attributes:
        name: what it is called in messages.
        actor: its ``ping`` gives a :class:`~openrlhf.ray.host.Sign` beside its work, and its ``drop`` ends what can be
            dropped.
        on_loss: called with the reason when it is lost; without it the wait ends with an error.
        limit_s: after so many seconds without an answer, or at the same point of a call, it is given up; None takes
            the time of the :class:`Watch`.
        sign: its last sign of life.
    """

    name: str
    actor: Any
    on_loss: Callable[[str], None] | None = None
    limit_s: float | None = None
    sign: Sign | None = None
    _ping: Any = None
    _asked: float = 0.0
    _since: float = 0.0
    _heard: float = 0.0

    @property
    def key(self) -> str:
        """What Ray calls the actor in its errors."""
        return self.actor._actor_id.hex()

    def begin(self, now: float) -> None:
        """Count its silence, and how long it stands still, from now on."""
        self._ping, self._since, self._heard = None, now, now

    def ask(self, now: float) -> None:
        """Send a ping unless one is under way."""
        if self._ping is None:
            self._ping, self._asked = self.actor.ping.remote(), now

    def hear(self, now: float) -> None:
        """Take the answer to a ping if there is one. Raises what Ray says when the actor is dead."""
        if self._ping is None or not ray.wait([self._ping], timeout=0)[0]:
            return
        ping, self._ping = self._ping, None
        sign = ray.get(ping)
        if self.sign is None:
            LOG.debug("%s is process %d", self.name, sign.pid)
        if self.sign is None or sign.headway != self.sign.headway:
            self._since = now
        self.sign, self._heard = sign, now

    def trouble(self, now: float, limit_s: float) -> str:
        """Return why it is given up, ``""`` while it is not; ``limit_s`` where it has no limit of its own."""
        limit_s = limit_s if self.limit_s is None else self.limit_s
        process = f" (process {self.sign.pid})" if self.sign else ""
        if self._ping is not None and now - self._asked >= limit_s:
            return f"No sign of life from {self.name} for {limit_s:.0f} s: stopped or hanging{process}"
        if self.sign and self.sign.headway and self._heard - self._since >= limit_s:
            return f"{self.name} made no headway for {limit_s:.0f} s: the call hangs{process}"
        return ""


class Watch:
    """Waits for futures that some actors are to answer, and looks after those actors meanwhile.

    Args:
        timeout_s: an actor that does not answer a ping for so long, or stands still in a call, is given up.
        look_every_s: seconds between two pings.
    """

    def __init__(self, timeout_s: float, look_every_s: float = LOOK_EVERY_S):
        self.timeout_s = timeout_s
        self.look_every_s = min(look_every_s, timeout_s)
        self._watched: dict[str, Watched] = {}
        self._asked = 0.0
        self._looked = 0.0

    def add(self, actor: Any, name: str, on_loss: Callable[[str], None] | None = None) -> Watched:
        """Watch ``actor``, called ``name`` in messages; see :class:`Watched`."""
        watched = Watched(name, actor, on_loss)
        self._watched[watched.key] = watched
        return watched

    def forget(self, watched: Watched) -> None:
        """Watch an actor no more."""
        self._watched.pop(watched.key, None)

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Return the values of ``futures``, in order.

        Raises:
            OpenRLHFError: what a worker raised; :class:`InfraError` when an actor died, does not answer or hangs;
                :class:`Preempted` when the run was asked to stop and may drop what it waits for here.
        """
        values: dict[Any, Any] = {}
        pending = list(dict.fromkeys(futures))
        while pending:
            done = self.turn(pending)
            pending = [future for future in pending if future not in done]
            values.update(zip(done, self._fetch(done), strict=True))
        return [values[future] for future in futures]

    def turn(self, futures: Sequence[Any]) -> list[Any]:
        """Return those of ``futures`` that are there; else wait a moment for them and look after the actors.

        For who waits in a loop of their own.

        Raises:
            InfraError: an actor that nobody replaces was lost.
            Preempted: see :meth:`get`.
        """
        self._listen()
        every = min(LISTEN_EVERY_S, self.look_every_s)
        done, pending = ray.wait(list(futures), num_returns=len(futures), timeout=every, fetch_local=False)
        if pending:
            self._look()
        return done

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Look after the actors while the block does other things than wait for them, such as run a reward function.

        Raises what :meth:`turn` would, when the block has ended.
        """
        done = threading.Event()
        with ThreadPoolExecutor(1, "watch") as pool:
            looking = pool.submit(self._keep_looking, done)
            try:
                yield
            finally:
                done.set()
        looking.result()

    def _keep_looking(self, done: threading.Event) -> None:
        while not done.wait(min(LISTEN_EVERY_S, self.look_every_s)):
            self._look()

    def translate(self, error: BaseException) -> BaseException:
        """Return what an error of Ray really is: the worker's own exception, or who died of what."""
        if isinstance(error, RayTaskError):
            return self.translate(error.cause)
        if isinstance(error, RayActorError):
            watched = self._watched.get(error.actor_id or "")
            name, sign = (watched.name, watched.sign) if watched else ("A worker", None)
            return InfraError(f"{name} died. {how_it_died(error, sign)}")
        if isinstance(error, RayError):
            return InfraError(f"Ray failed: {one_line(error)}")
        return error

    def _listen(self) -> None:
        """Leave the wait when the run was asked to stop and may leave it; the actors drop what they do, too."""
        try:
            signals.check()
        except Preempted:
            for watched in self._watched.values():
                watched.actor.drop.remote()
            raise

    def _look(self) -> None:
        """Read the answers to pings, and send new ones now and then.

        Raises:
            InfraError: an actor that nobody replaces died, gave no sign of life, or stood still in a call.
        """
        now = time.monotonic()
        if now - self._looked > 2 * self.look_every_s:
            # Nobody listened between two waits, or this process stood still itself.
            for watched in self._watched.values():
                watched.begin(now)
        self._looked = now
        lost = [(watched, trouble) for watched in self._watched.values() if (trouble := self._trouble(watched, now))]
        for_good = [trouble for watched, trouble in lost if watched.on_loss is None]
        if for_good:
            raise InfraError("; ".join(for_good))
        for watched, trouble in lost:
            watched.on_loss(trouble)
        if now - self._asked >= self.look_every_s:
            self._asked = now
            for watched in self._watched.values():
                watched.ask(now)

    def _trouble(self, watched: Watched, now: float) -> str:
        try:
            watched.hear(now)
        except RayError as error:
            return str(self.translate(error))
        return watched.trouble(now, self.timeout_s)

    def _fetch(self, futures: list[Any]) -> list[Any]:
        try:
            return ray.get(futures, timeout=self.timeout_s)
        except RayError as error:
            told = self.translate(error)
            raise told from (None if isinstance(told, OpenRLHFError) else error)
