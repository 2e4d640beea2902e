"""One request to one reward server: what comes back in time, and whether another try may help.

Three kinds of failure are told apart:

* infrastructure (no connection, no answer in time, a broken body, a body that is no JSON, 408, 429, 5xx):
  ``Unavailable``, another try may help;
* data (any other status): the server understood and refuses; ``DataError``;
* a wrong answer (JSON of another shape, a reward that is not finite) is found by whoever reads what is returned.

Proxies of the environment and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass

import aiohttp

from openrlhf.errors import DataError

LONGEST_ANSWER = 16 * 2**20
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


class Unavailable(Exception):
    """A failure of infrastructure; ``wait_s`` is the pause that the server asked for."""

    def __init__(self, why: str, wait_s: float | None = None, busy: bool = False):
        super().__init__(why)
        self.wait_s = wait_s
        self.busy = busy


def new_session(patience: Patience, key: str) -> aiohttp.ClientSession:
    """Return a session that sends ``key`` where there is one, and knows no proxies, cookies or compression."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s),
        trust_env=False,
        auto_decompress=False,
    )


async def exchange(session: aiohttp.ClientSession, url: str, body: bytes, patience: Patience) -> object:
    """Return what the JSON of the answer to ``body`` stands for.

    Raises:
        Unavailable: another try may help.
        DataError: the server refuses.
    """
    try:
        answer = await asyncio.wait_for(_post(session, url, body), patience.try_s)
    except aiohttp.ServerTimeoutError as error:
        raise Unavailable(f"no connection within {patience.connect_s:g} s") from error
    except asyncio.TimeoutError as error:
        raise Unavailable(f"no whole answer within {patience.try_s:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}"[:300]) from error
    return _judge(url, *answer)


def shown(url: str) -> str:
    """Return an address as it may be shown: what follows a question mark may be secret."""
    return url.partition("?")[0]


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
        Unavailable: another try may help.
        DataError: the server refuses.
    """
    if status in TRY_AGAIN or status >= 500:
        busy = status == 429 or (status == 503 and wait_s is not None)
        raise Unavailable(f"status {status}{_excerpt(body)}", wait_s, busy)
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
        raise Unavailable(f"the answer is no JSON{_excerpt(body)}") from error


def _excerpt(body: bytes, width: int = 120) -> str:
    """Return the beginning of a body for a message, on one line and printable."""
    text = " ".join(body[: 4 * width].decode("utf-8", "replace").split())
    text = "".join(letter for letter in text if letter.isprintable())
    return f": {text[:width]}" if text else ""
