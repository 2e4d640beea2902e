"""A reward server that misbehaves in the ways that servers do, on a real socket of this machine."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

JSON = "application/json"


def reward_of(query: str) -> float:
    """Return the true reward of a text: what a good answer holds."""
    return len(query) + (sum(map(ord, query)) % 97) / 128


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        """Print nothing: clients leave, which many of these tests are about."""


class FakeRewardServer:
    """A server on the loopback; ``mode(handler, request)`` answers each request, ``request`` its JSON.

    Attributes:
        requests: the JSON of every request, in the order of their arrival.
        headers: the headers of every request.
        times: when each arrived.
    """

    def __init__(self, mode: Callable):
        self.requests, self.headers, self.times = [], [], []
        lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.seconds = 30.0
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.requests.append(body)
                    fake.headers.append(dict(self.headers))
                    fake.times.append(time.monotonic())
                    self.number = len(fake.requests)
                self.stopped = fake.stopped
                try:
                    mode(self, body)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_):
                """Print nothing."""

        self.stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/get_reward"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def interrupted_after(seconds: float):
    """Let a signal raise KeyboardInterrupt in the main thread, as a run that is asked to stop would."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def send(handler, body: bytes, status: int = 200, kind: str = JSON, **headers: str) -> None:
    """Answer with ``body``."""
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", headers.pop("length", str(len(body))))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def good(handler, request) -> None:
    """Answer with the true rewards."""
    send(handler, json.dumps({"rewards": [reward_of(query) for query in request["query"]]}).encode())


def status(code: int, **headers: str) -> Callable:
    """Return the mode that answers every request with ``code``; the rewards in its body must not be believed."""

    def mode(handler, request):
        answer = json.dumps({"rewards": [1.0] * len(request["query"])}).encode()
        send(handler, b"" if code == 204 else answer, code, **headers)

    return mode


def rewards(change: Callable) -> Callable:
    """Return the mode that answers with ``change(true rewards)`` in place of the true ones, as JSON as python's."""

    def mode(handler, request):
        changed = change([reward_of(query) for query in request["query"]])
        send(handler, json.dumps({"rewards": changed}).encode())

    return mode


def body(text: str, kind: str = JSON) -> Callable:
    """Return the mode that answers with ``text``."""
    return lambda handler, request: send(handler, text.encode(), kind=kind)


def truncated(handler, request) -> None:
    """Answer with JSON that ends too early, in a body that does not."""
    send(handler, json.dumps({"rewards": [1.0] * len(request["query"])}).encode()[:-4])


def reset(handler, request) -> None:
    """Promise more than is sent, and close."""
    send(handler, b'{"rewards": [1.0', length="400")
    handler.close_connection = True


def hang(handler, request) -> None:
    """Say nothing."""
    handler.stopped.wait(30)


def drip_body(handler, request) -> None:
    """Send a good answer, one byte at a time, too slowly to wait for."""
    answer = json.dumps({"rewards": [reward_of(query) for query in request["query"]]}).encode()
    send(handler, b"", length=str(len(answer)))
    for byte in answer:
        handler.wfile.write(bytes([byte]))
        if handler.stopped.wait(0.1):
            return


def drip_headers(handler, request) -> None:
    """Send headers without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.stopped.wait(0.1):
        handler.wfile.write(b"X: y\r\n")


def huge(handler, request) -> None:
    """Send 200 MB."""
    send(handler, b'{"rewards": [', length=str(200 * 2**20))
    piece = b"1.0, " * 2**16
    for _ in range(200 * 2**20 // len(piece)):
        handler.wfile.write(piece)


def fails(times: int, mode: Callable | None = None) -> Callable:
    """Return the mode that answers as ``mode``, by default with status 500, for so many requests, then well."""
    ill = mode or status(500)
    return lambda handler, request: (ill if handler.number <= times else good)(handler, request)


def not_http(handler, request) -> None:
    """Answer with something that is not HTTP."""
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True
