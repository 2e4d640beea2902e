"""Rewards of HTTP servers: asked side by side, within deadlines, and never believed unchecked.

A request is ``POST {"query": [...], "prompts": [...], "labels": [...]}``, its answer
``{"rewards": [...], "scores": [...], "extra_logs": {name: [...]}}``, the last two if the server likes. Where another
try may help (``reward_request.py`` says where), there is one after a growing pause or the server's ``Retry-After``, at
the next replica where there is one; then the run ends. A server that refuses or gives a wrong answer ends it at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from openrlhf.errors import InfraError
from openrlhf.rollout.reward_request import Patience, Unavailable, exchange, new_session, shown
from openrlhf.rollout.reward_result import RewardResult, names_of, result_from_json

IN_FLIGHT = 4
"""Requests that a server is asked at a time; it may batch them."""
LARGEST_REQUEST = 4 * 2**20
"""Bytes of a request of several queries: our own server takes 8 MiB."""


@dataclass
class _Batch:
    """The queries of one request: how messages call them, and the body that asks for their rewards."""

    names: list[str]
    body: bytes


@dataclass
class _Replicas:
    """Servers that give the same rewards, of which each request asks one: a healthy one, the least busy."""

    urls: Sequence[str]
    ill_until: dict[str, float] = field(default_factory=dict)
    in_flight: Counter = field(default_factory=Counter)

    def choose(self, tried: Counter) -> str:
        """Return the server to ask next by a request that has asked ``tried`` before."""
        now = time.monotonic()
        return min(self.urls, key=lambda url: (tried[url], self.ill_until.get(url, now) > now, self.in_flight[url]))


def say_on_stderr(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


class RemoteRewards:
    """Reward servers. Not for several threads at a time.

    Args:
        sources: the servers of each source of rewards; those of one source are replicas.
        batch_size: most queries of a request.
        key: sent as ``Authorization: Bearer KEY``.
        patience: deadlines and tries.
        say: told of every kind of failure that is tried again, once a call.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        key: str = "",
        patience: Patience | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ):
        self._sources = [_Replicas(urls) for urls in sources]
        self._batch_size = batch_size
        self._key = key
        self._patience = patience or Patience()
        self._say = say
        self._said: set[str] = set()

    def score(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[str] | None = None,
        uids: Sequence[str] | None = None,
    ) -> list[RewardResult]:
        """Return the checked rewards of every source; arguments and errors as of
        :meth:`~openrlhf.rollout.reward_result.RewardSource.score`.
        """
        names = names_of(len(queries), uids)
        batches = self._cut(names, queries, prompts, [""] * len(queries) if labels is None else labels)
        self._said.clear()
        answers = asyncio.run(self._ask_all(batches))
        count = len(batches)
        return [
            RewardResult.join(answers[number * count : (number + 1) * count], ", ".join(map(shown, source.urls)))
            for number, source in enumerate(self._sources)
        ]

    def _cut(self, names: Sequence[str], *columns: Sequence[str]) -> list[_Batch]:
        """Return the requests: at most ``batch_size`` queries each, and not too much text at once."""
        groups: list[list[tuple[str, ...]]] = []
        size = 0
        for row in zip(names, *columns, strict=True):
            length = len(json.dumps(row))
            if not groups or len(groups[-1]) == self._batch_size or size + length > LARGEST_REQUEST:
                groups.append([])
                size = 0
            groups[-1].append(row)
            size += length
        return [_batch(group) for group in groups]

    async def _ask_all(self, batches: list[_Batch]) -> list[RewardResult]:
        """Return the answers to all batches, source by source."""
        async with new_session(self._patience, self._key) as session:
            tasks = []
            for source in self._sources:
                room = asyncio.Semaphore(IN_FLIGHT * len(source.urls))
                tasks += [asyncio.create_task(self._ask(session, source, batch, room)) for batch in batches]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(
        self, session: aiohttp.ClientSession, source: _Replicas, batch: _Batch, room: asyncio.Semaphore
    ) -> RewardResult:
        """Return the rewards of one batch, after as many tries as the patience has."""
        tried: Counter = Counter()
        last: dict[str, str] = {}
        started, failures, pauses = None, 0, 0
        while True:
            async with room:
                started = started or time.monotonic()
                url = source.choose(tried)
                try:
                    return await self._try(session, source, url, batch)
                except Unavailable as failure:
                    reason = failure
            tried[url] += 1
            pauses += 1
            last[url] = str(reason)
            if not reason.busy or time.monotonic() - started > self._patience.try_s:
                failures += 1
            if failures >= self._patience.tries:
                raise InfraError(_given_up(last, pauses, time.monotonic() - started, batch.names)) from reason
            self._tell(url, str(reason))
            await asyncio.sleep(self._patience.pause(pauses, reason.wait_s))

    async def _try(self, session: aiohttp.ClientSession, source: _Replicas, url: str, batch: _Batch) -> RewardResult:
        """Return the rewards of one batch from one server. Raises Unavailable where another try may help."""
        source.in_flight[url] += 1
        try:
            document = await exchange(session, url, batch.body, self._patience)
        except Unavailable:
            source.ill_until[url] = time.monotonic() + self._patience.ill_s
            raise
        finally:
            source.in_flight[url] -= 1
        source.ill_until.pop(url, None)
        return result_from_json(document, batch.names, shown(url))

    def _tell(self, url: str, reason: str) -> None:
        line = f"reward server {shown(url)}: {reason}; trying again"
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def _batch(rows: list[tuple[str, ...]]) -> _Batch:
    names, queries, prompts, labels = (list(column) for column in zip(*rows, strict=True))
    return _Batch(names, json.dumps({"query": queries, "prompts": prompts, "labels": labels}).encode())


def _given_up(last: dict[str, str], tries: int, seconds: float, names: Sequence[str]) -> str:
    reasons = "; ".join(f"{shown(url)}: {reason}" for url, reason in last.items())
    who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"no rewards for {who} after {tries} tries in {seconds:.1f} s. The last failure of {reasons}. Is the server "
        "of --remote_rm_url running? --remote_rm_tries and --remote_rm_timeout say how long to wait"
    )
