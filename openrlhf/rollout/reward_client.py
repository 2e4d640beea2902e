"""Rewards of HTTP servers: asked side by side, within deadlines, and never believed unchecked.

A request is ``POST {"query": [...], "prompts": [...], "labels": [...]}``, its answer
``{"rewards": [...], "scores": [...], "extra_logs": {name: [...]}}``, the last two if the server likes. Three kinds of
failure are told apart:

* infrastructure (no connection, no answer in time, a broken body, a body that is no JSON, 408, 429, 5xx): tried again,
  after a growing pause or the server's ``Retry-After``, at the next replica where there is one; then ``InfraError``;
* data (any other status): the server understood and refuses; ``DataError`` at once;
* a wrong answer (not one finite number a query): ``DataError`` or ``NumericError`` at once.

Proxies of the environment and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from openrlhf.errors import DataError, InfraError
from openrlhf.rollout.reward_result import RewardResult, names_of, result_from_json

IN_FLIGHT = 4
"""Requests that a server is asked at a time; it may batch them."""
LONGEST_ANSWER = 16 * 2**20
LARGEST_REQUEST = 4 * 2**20
"""Bytes of a request of several queries: our own server takes 8 MiB."""
TRY_AGAIN = (408, 429)
_jitter = random.SystemRandom()
"""Not the run's own random numbers: how often a server fails must not change what is learnt."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, all in seconds.

    Attributes:
        tries: how often a request is sent before the run ends. A server that only says it is busy (429, or 503 with
            ``Retry-After``) uses up none of them for the time of one try.
        try_s: from sending a request to the last byte of its answer.
        connect_s: to a connection.
        pause_s: the pause after the first failure; it doubles with each, with a jitter of half.
        longest_pause_s: no pause is longer.
        ill_s: for so long after a failure a replica is asked only when the others have failed too.
    """

    tries: int = 5
    try_s: float = 180.0
    connect_s: float = 5.0
    pause_s: float = 0.5
    longest_pause_s: float = 30.0
    ill_s: float = 30.0

    def pause(self, failures: int, asked: float | None) -> float:
        """Return the pause after ``failures`` failures; ``asked`` is what the server asked for."""
        if asked is not None:
            return min(asked, self.longest_pause_s)
        return min(self.longest_pause_s, self.pause_s * 2 ** (failures - 1)) * _jitter.uniform(0.5, 1.0)


@dataclass
class _Batch:
    """The queries of one request: how messages call them, and the body that asks for their rewards."""

    names: list[str]
    body: bytes


class _Unavailable(Exception):
    """A failure of infrastructure; ``wait_s`` is the pause that the server asked for."""

    def __init__(self, why: str, wait_s: float | None = None, busy: bool = False):
        super().__init__(why)
        self.wait_s = wait_s
        self.busy = busy


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
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
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
            _joined(answers[number * count : (number + 1) * count], ", ".join(map(shown, source.urls)))
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
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._patience.connect_s)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=timeout,
            trust_env=False,
            auto_decompress=False,
        ) as session:
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
        started = time.monotonic()
        failures, pauses = 0, 0
        while True:
            async with room:
                url = source.choose(tried)
                try:
                    return await self._try(session, source, url, batch)
                except _Unavailable as failure:
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
        """Return the rewards of one batch from one server. Raises _Unavailable where another try may help."""
        source.in_flight[url] += 1
        try:
            document = _judge(url, *await self._exchange(session, url, batch.body))
        except _Unavailable:
            source.ill_until[url] = time.monotonic() + self._patience.ill_s
            raise
        finally:
            source.in_flight[url] -= 1
        source.ill_until.pop(url, None)
        return result_from_json(document, batch.names, shown(url))

    async def _exchange(
        self, session: aiohttp.ClientSession, url: str, body: bytes
    ) -> tuple[int, float | None, bytes]:
        """Return what :func:`_post` does, in time. Raises _Unavailable."""
        try:
            return await asyncio.wait_for(_post(session, url, body), self._patience.try_s)
        except aiohttp.ServerTimeoutError as error:
            raise _Unavailable(f"no connection within {self._patience.connect_s:g} s") from error
        except asyncio.TimeoutError as error:
            raise _Unavailable(f"no whole answer within {self._patience.try_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Unavailable(f"{type(error).__name__}: {error}"[:300]) from error

    def _tell(self, url: str, reason: str) -> None:
        line = f"reward server {shown(url)}: {reason}; trying again"
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def shown(url: str) -> str:
    """Return an address as it may be shown: what follows a question mark may be secret."""
    return url.partition("?")[0]


def _batch(rows: list[tuple[str, ...]]) -> _Batch:
    names, queries, prompts, labels = (list(column) for column in zip(*rows, strict=True))
    return _Batch(names, json.dumps({"query": queries, "prompts": prompts, "labels": labels}).encode())


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> tuple[int, float | None, bytes]:
    """Return the status, the ``Retry-After`` in seconds and the body of the answer, read up to its limit."""
    async with session.post(url, data=body, allow_redirects=False) as response:
        wanted = response.headers.get("Retry-After", "")
        wait_s = float(wanted) if wanted.isdecimal() else None
        content = bytearray()
        async for piece in response.content.iter_chunked(2**16):
            content += piece
            if len(content) > LONGEST_ANSWER:
                response.close()
                break
        return response.status, wait_s, bytes(content)


def _judge(url: str, status: int, wait_s: float | None, body: bytes) -> object:
    """Return what the JSON of a good answer stands for.

    Raises:
        _Unavailable: another try may help.
        DataError: the server refuses.
    """
    if status in TRY_AGAIN or status >= 500:
        busy = status == 429 or (status == 503 and wait_s is not None)
        raise _Unavailable(f"status {status}{_excerpt(body)}", wait_s, busy)
    if 300 <= status < 400:
        raise DataError(f"{shown(url)} answers with a redirect (status {status}), which is not followed: give the "
                        "address that it leads to in --remote_rm_url")  # fmt: skip
    if status in (401, 403):
        raise DataError(
            f"{shown(url)} refuses the key (status {status}){_excerpt(body)}: give it with --remote_rm_key"
        )
    if status != 200:
        raise DataError(f"{shown(url)} refuses the request with status {status}{_excerpt(body)}")
    if len(body) > LONGEST_ANSWER:
        raise DataError(f"{shown(url)} gave more than {LONGEST_ANSWER // 2**20} MiB where rewards were asked for")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Unavailable(f"the answer is no JSON{_excerpt(body)}") from error


def _excerpt(body: bytes, width: int = 120) -> str:
    """Return the beginning of a body for a message, on one line and printable."""
    text = " ".join(body[: 4 * width].decode("utf-8", "replace").split())
    text = "".join(letter for letter in text if letter.isprintable())
    return f": {text[:width]}" if text else ""


def _given_up(last: dict[str, str], tries: int, seconds: float, names: Sequence[str]) -> str:
    reasons = "; ".join(f"{shown(url)}: {reason}" for url, reason in last.items())
    who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"no rewards for {who} after {tries} tries in {seconds:.1f} s. The last failure of {reasons}. Is the server "
        "of --remote_rm_url running? --remote_rm_tries and --remote_rm_timeout say how long to wait"
    )


def _joined(parts: Sequence[RewardResult], who: str) -> RewardResult:
    """Return the answers to the batches of one source as one."""
    names = set(parts[0].extra) if parts else set()
    if any(set(part.extra) != names for part in parts):
        raise DataError(f"{who} gave other names of 'extra_logs' or 'scores' for some queries than for others")
    extra = {name: [value for part in parts for value in part.extra[name]] for name in sorted(names)}
    return RewardResult([value for part in parts for value in part.rewards], extra)
