"""The web server of a reward model: ``POST /get_reward`` and ``GET /health``.

    {"query": ["text", ...], "prompts": [...], "labels": [...]}  ->  {"rewards": [1.5, ...]}

``prompts`` and ``labels`` may be missing; a reward model does not read them. Requests that wait are scored together in
one thread beside the event loop, so that the server answers while the model works. Nothing that it is sent is logged.

=== =========================================================================================
400 the body is no JSON
401 the key is missing or wrong
408 the body did not come in time
413 the body, the number of texts or a text is too large
422 ``query`` is not a list of texts, or the model gives no finite number for one
429 too many requests wait; ``Retry-After`` says when to come again
503 the model failed, or the server is being stopped
=== =========================================================================================
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import json
import math
import socket
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from openrlhf.errors import InfraError
from openrlhf.rollout.reward_batcher import Batcher, Limits, Refused, Score

GOODBYE_S = 5
"""How long requests that are being answered have when the server is stopped."""
DRAINED = 8
"""Of a body that is too long, this many times the limit is read and dropped: a client that sends hears no answer."""


def build_app(score: Score, *, key: str = "", name: str = "", limits: Limits | None = None) -> FastAPI:
    """Return the application.

    Args:
        score: texts -> rewards; called from one thread.
        key: what requests must bring as ``Authorization: Bearer KEY``; ``""``: nothing.
        name: of the model, shown by ``/health``.
        limits: what a request may ask for.
    """
    bounds = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        app.state.batcher = Batcher(score, bounds)
        worker = asyncio.create_task(app.state.batcher.work())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": app.state.batcher.waiting}

    @app.post("/get_reward")
    async def get_reward(request: Request) -> JSONResponse:
        _check_key(request, key)
        texts = texts_of(await _read(request, bounds), bounds)
        rewards = await _rewards(request, app.state.batcher, texts)
        return JSONResponse({"rewards": rewards})

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    return app


def _check_key(request: Request, key: str) -> None:
    """Raise Refused when the request does not bring the key; takes equally long whatever it brings."""
    brought = request.headers.get("Authorization", "")
    if key and not hmac.compare_digest(brought.encode(), f"Bearer {key}".encode()):
        raise Refused(401, "this server wants a key: Authorization: Bearer KEY", **{"WWW-Authenticate": "Bearer"})


async def _read(request: Request, limits: Limits) -> bytes:
    """Return the body, however its length was announced. Raises Refused when it is too long or too slow."""
    body, size = bytearray(), 0

    async def read() -> None:
        nonlocal size
        async for piece in request.stream():
            size += len(piece)
            if size <= limits.body:
                body.extend(piece)
            elif size > DRAINED * limits.body:
                return

    try:
        await asyncio.wait_for(read(), limits.read_s)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not come within {limits.read_s:g} s", Connection="close") from None
    if size > limits.body:
        raise Refused(413, f"the body has more than {limits.body} bytes: send fewer texts", Connection="close")
    return bytes(body)


def texts_of(body: bytes, limits: Limits) -> list[str]:
    """Return the texts of a request. Raises Refused when there are none, too many, or something else than texts."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, 'the body is no JSON; send {"query": ["text", ...]}') from None
    texts = document.get("query") if isinstance(document, dict) else None
    if not isinstance(texts, list) or not texts:
        raise Refused(422, '"query" should be a list of one text or more')
    if len(texts) > limits.texts:
        raise Refused(413, f'"query" has {len(texts)} texts, at most {limits.texts} are taken at once')
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refused(422, f"query {number} is not a text")
        if len(text) > limits.text:
            raise Refused(413, f"query {number} has {len(text)} characters, at most {limits.text} are taken")
        if not _is_unicode(text):
            raise Refused(422, f"query {number} holds half of a surrogate pair, which is no text")
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _rewards(request: Request, batcher: Batcher, texts: list[str]) -> list[float]:
    """Return the rewards of the texts. Raises Refused when the model has none; stops when the client leaves."""
    rewards = batcher.submit(texts)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({rewards, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
    if not rewards.done():
        rewards.cancel()
        raise Refused(499, "the client has left")
    if rewards.cancelled():
        raise Refused(503, "the server is being stopped")
    if rewards.exception() is not None:
        raise Refused(503, f"the model failed on these texts: {type(rewards.exception()).__name__}")
    for number, reward in enumerate(rewards.result()):
        if not math.isfinite(reward):
            raise Refused(422, f"the model gives no finite reward for query {number}, but {reward}")
    return rewards.result()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with an address that refuses connections still. Raises InfraError when it cannot have it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        raise InfraError(f"cannot listen on --host {host} --port {port}: {error}; choose another --port") from error
    return place


def web_server(app: FastAPI, limits: Limits | None = None) -> uvicorn.Server:
    """Return the server of ``app``; its ``run(sockets=[...])`` answers until it is stopped."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=(limits or Limits()).connections,
        timeout_graceful_shutdown=GOODBYE_S,
    )
    return uvicorn.Server(config)


def serve(app: FastAPI, place: socket.socket, limits: Limits | None = None) -> None:
    """Answer requests on ``place`` until SIGTERM or SIGINT; requests that are being answered are answered."""
    # What is loaded by now stays: to look through it for garbage would stop all answers for a quarter of a second.
    # Thawed at the end, else libraries that count their objects call it leaked.
    gc.freeze()
    try:
        web_server(app, limits).run(sockets=[place])
    except KeyboardInterrupt:
        pass  # uvicorn stops in order and then raises the signal once more, for whoever answered it before
    finally:
        gc.unfreeze()
