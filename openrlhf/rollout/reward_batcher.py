"""How the requests to a reward server reach its model: in turn, together where they wait, and not too many."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

Score = Callable[[Sequence[str]], list[float]]


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Attributes:
        body: bytes of a request.
        texts: texts of a request.
        text: characters of a text.
        waiting: requests that wait for the model.
        together: texts of several requests that are scored at once.
        read_s: seconds for the body of a request to arrive.
        connections: open connections.
    """

    body: int = 8 * 2**20
    texts: int = 1024
    text: int = 2**16
    waiting: int = 64
    together: int = 64
    read_s: float = 30.0
    connections: int = 1024


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, why: str, **headers: str):
        super().__init__(why)
        self.status = status
        self.headers = headers


@dataclass
class _Job:
    """The texts of a request and the future of their rewards."""

    texts: list[str]
    rewards: asyncio.Future[list[float]]


class Batcher:
    """Scores the texts of requests in the order in which they come, those that wait together, in one thread."""

    def __init__(self, score: Score, limits: Limits):
        self._score = score
        self._limits = limits
        self._waiting: deque[_Job] = deque()
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-model")

    @property
    def waiting(self) -> int:
        """Requests that the model has not begun."""
        return len(self._waiting)

    def submit(self, texts: list[str]) -> asyncio.Future[list[float]]:
        """Return the future of the rewards of ``texts``; one that is cancelled before its turn costs nothing.

        Raises:
            Refused: too many requests wait.
        """
        if len(self._waiting) >= self._limits.waiting:
            raise Refused(
                429, f"{len(self._waiting)} requests are waiting already; come again", **{"Retry-After": "1"}
            )
        job = _Job(texts, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._came.set()
        return job.rewards

    async def work(self) -> None:
        """Score what comes until cancelled."""
        try:
            while True:
                await self._came.wait()
                self._came.clear()
                while jobs := self._next():
                    await self._score_together(jobs)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
            for job in self._waiting:
                job.rewards.cancel()

    def _next(self) -> list[_Job]:
        """Return the requests to score next: the first that waits and those behind it that fit."""
        jobs: list[_Job] = []
        count = 0
        while self._waiting and (not jobs or count + len(self._waiting[0].texts) <= self._limits.together):
            job = self._waiting.popleft()
            if not job.rewards.done():
                jobs.append(job)
                count += len(job.texts)
        return jobs

    def _scored(self, texts: list[str]) -> list[float]:
        """Return the rewards of ``texts``. Raises ValueError when the model gives more or fewer."""
        rewards = self._score(texts)
        if len(rewards) != len(texts):
            raise ValueError(f"{len(rewards)} rewards for {len(texts)} texts")
        return rewards

    async def _score_together(self, jobs: list[_Job]) -> None:
        """Answer ``jobs``; when they fail together, each by itself, so that none spoils another."""
        texts = [text for job in jobs for text in job.texts]
        scoring = asyncio.get_running_loop().run_in_executor(self._thread, self._scored, texts)
        await asyncio.wait({scoring})
        error = scoring.exception()
        if error is not None and len(jobs) > 1:
            for job in jobs:
                await self._score_together([job])
        elif error is not None:
            print(f"serve_rm: the model failed on {len(texts)} texts: {type(error).__name__}", file=sys.stderr)
            _settle(jobs[0], lambda future: future.set_exception(error))
        else:
            rewards = iter(scoring.result())
            for job in jobs:
                own = [next(rewards) for _ in job.texts]
                _settle(job, lambda future, own=own: future.set_result(own))


def _settle(job: _Job, how: Callable[[asyncio.Future], None]) -> None:
    if not job.rewards.done():
        how(job.rewards)
