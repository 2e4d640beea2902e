"""The web server of a reward model: real sockets, and a function in the model's place."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import requests

from openrlhf.errors import InfraError
from openrlhf.rollout.reward_batcher import Limits
from openrlhf.rollout.reward_client import RemoteRewards
from openrlhf.rollout.reward_request import Patience
from openrlhf.rollout.reward_server import bind, build_app, web_server
from tests.rollout.fake_reward_server import reward_of

SMALL = Limits(body=4096, texts=4, text=500, waiting=3, together=8, read_s=0.5)


@contextmanager
def serving(score=lambda texts: [reward_of(text) for text in texts], *, key="", limits=SMALL):
    """Serve in a thread; yield the address of ``/get_reward``."""
    place = bind("127.0.0.1", 0)
    server = web_server(build_app(score, key=key, name="toy", limits=limits), limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}/get_reward"
    finally:
        server.should_exit = True
        thread.join(20)
        place.close()


def ask(url, texts, **options):
    return requests.post(url, json={"query": texts}, timeout=20, **options)


def health(url):
    return requests.get(url.replace("get_reward", "health"), timeout=20)


def raw(url: str, text: bytes, wait_s: float = 5.0) -> bytes:
    """Send ``text`` as it is and return what comes back."""
    with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=wait_s) as connection:
        connection.sendall(text)
        return connection.recv(2**16)


@pytest.fixture(scope="module")
def small():
    """Return the address of a server with small limits."""
    with serving() as url:
        yield url


def test_a_request_of_openrlhf_gets_its_rewards(small):
    texts = ["a", "bb", "漢字"]
    answer = requests.post(small, json={"query": texts, "prompts": ["a", "b", ""], "labels": [""] * 3}, timeout=20)
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {"rewards": [reward_of(text) for text in texts]}
    assert ask(small, [""]).json() == {"rewards": [0.0]}
    assert health(small).json() == {"status": "ok", "model": "toy", "waiting": 0}


BAD = {
    "no query": (b"{}", 422, "list of one text"),
    "another name": (b'{"queries": ["a"]}', 422, "list of one text"),
    "no list": (b'{"query": "a"}', 422, "list of one text"),
    "empty": (b'{"query": []}', 422, "list of one text"),
    "a number": (b'{"query": ["a", 1]}', 422, "query 1 is not a text"),
    "a null": (b'{"query": [null]}', 422, "query 0 is not a text"),
    "a list": (b'["a"]', 422, "list of one text"),
    "no JSON": (b"query=a", 400, "no JSON"),
    "cut JSON": (b'{"query": ["a"', 400, "no JSON"),
    "no UTF-8": (b'{"query": ["\xff\xfe"]}', 400, "no JSON"),
    "half a surrogate pair": (b'{"query": ["\\ud800"]}', 422, "surrogate"),
    "nothing": (b"", 400, "no JSON"),
    "deep JSON": (b"[" * 4000, 400, "no JSON"),
    "too many texts": (json.dumps({"query": ["a"] * 5}).encode(), 413, "5 texts, at most 4"),
    "a long text": (json.dumps({"query": ["a" * 501]}).encode(), 413, "501 characters, at most 500"),
    "a long body": (b" " * 5000, 413, "more than 4096 bytes"),
    "a very long body": (b" " * 40_000, 413, "more than 4096 bytes"),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "in chunks"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_clear_answer_and_the_server_goes_on(small, name, chunked):
    body, status, says = BAD[name]
    answer = requests.post(small, data=iter([body[:10], body[10:]]) if chunked and body[10:] else body, timeout=20)
    assert answer.status_code == status
    assert says in answer.json()["error"]
    assert ask(small, ["a"]).json() == {"rewards": [reward_of("a")]}


def test_other_addresses_and_methods_are_refused(small):
    assert requests.get(small, timeout=20).status_code == 405
    assert requests.post(small.replace("get_reward", ""), timeout=20).status_code == 404
    for path in ("docs", "openapi.json", "redoc"):
        assert requests.get(small.replace("get_reward", path), timeout=20).status_code == 404


def test_a_body_that_does_not_come_is_not_awaited(small):
    head = b"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    assert b" 408 " in raw(small, head + b"{").splitlines()[0]


def test_slow_clients_do_not_slow_the_others(small):
    head = b"POST /get_reward HTTP/1.1\r\nHost: x\r\n"
    slow = [socket.create_connection(("127.0.0.1", urlsplit(small).port), timeout=5) for _ in range(100)]
    for connection in slow:
        connection.sendall(head)
    try:
        assert health(small).elapsed.total_seconds() < 1
        assert ask(small, ["a"]).json() == {"rewards": [reward_of("a")]}
    finally:
        for connection in slow:
            connection.close()


def test_a_key_is_asked_for_where_there_is_one():
    with serving(key="s3cret") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "é"}):
            sent = {name: value.encode() for name, value in headers.items()}
            answer = ask(url, ["a"], headers=sent)
            assert answer.status_code == 401 and "wants a key" in answer.json()["error"]
        assert ask(url, ["a"], headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert health(url).status_code == 200


class Gate:
    """A model that waits until it is told to go on, and remembers what it was asked together."""

    def __init__(self):
        self.open, self.asked = threading.Event(), []

    def __call__(self, texts):
        self.asked.append(list(texts))
        self.open.wait(20)
        return [reward_of(text) for text in texts]


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_that_wait_are_scored_together_and_too_many_are_sent_away():
    gate = Gate()
    with serving(gate) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, url, ["a"])
        until(lambda: gate.asked)
        others = []
        for number in range(3):
            others.append(pool.submit(ask, url, [f"b{number}", f"c{number}"]))
            until(lambda number=number: health(url).json()["waiting"] == number + 1)
        refused = ask(url, ["d"])
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert health(url).elapsed.total_seconds() < 1
        gate.open.set()
        assert first.result().json() == {"rewards": [reward_of("a")]}
        for number, other in enumerate(others):
            assert other.result().json() == {"rewards": [reward_of(f"b{number}"), reward_of(f"c{number}")]}
    assert gate.asked[0] == ["a"] and len(gate.asked) == 2 and len(gate.asked[1]) == 6


def test_a_client_that_left_costs_the_model_nothing():
    gate = Gate()
    with serving(gate) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url, ["a"])
        until(lambda: gate.asked)
        body = b'{"query": ["gone"]}'
        head = b"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=5) as connection:
            connection.sendall(head + body)
            until(lambda: health(url).json()["waiting"] == 1)
        time.sleep(0.2)
        gate.open.set()
        assert first.result().status_code == 200 and ask(url, ["b"]).status_code == 200
    assert gate.asked == [["a"], ["b"]]


def test_a_text_that_the_model_fails_on_spoils_no_other_request(capfd):
    gate = threading.Event()

    def score(texts):
        gate.wait(20)
        if "bad" in texts:
            raise RuntimeError("out of memory, said the model about s3cret")
        if "none" in texts:
            return []
        return [float("nan") if text == "nan" else reward_of(text) for text in texts]

    with serving(score) as url, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, url, [text]) for text in ("good", "bad", "nan")]
        time.sleep(0.3)
        gate.set()
        good, bad, nan = (answer.result() for answer in answers)
        assert good.json() == {"rewards": [reward_of("good")]}
        assert bad.status_code == 503 and "RuntimeError" in bad.json()["error"]
        assert nan.status_code == 422 and "no finite reward for query 0, but nan" in nan.json()["error"]
        assert ask(url, ["none"]).status_code == 503
        assert ask(url, ["after"]).status_code == 200
    logged = "".join(capfd.readouterr())
    assert "failed on" in logged and "s3cret" not in logged and "bad" not in logged


def test_what_is_being_answered_is_answered_before_the_server_stops():
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        with serving(gate) as url:
            first = pool.submit(ask, url, ["a"])
            until(lambda: gate.asked)
            threading.Timer(0.3, gate.open.set).start()
        assert first.result().json() == {"rewards": [reward_of("a")]}
    with pytest.raises(requests.ConnectionError):
        health(url)


def test_an_address_in_use_is_named():
    with bind("127.0.0.1", 0) as place, pytest.raises(InfraError, match="--port .*choose another"):
        place.listen()
        bind("127.0.0.1", place.getsockname()[1])


def test_our_client_waits_for_a_server_that_is_busy():
    def slow(texts):
        time.sleep(0.01)
        return [reward_of(text) for text in texts]

    limits = Limits(waiting=1, together=1)
    queries = [f"text {number}" for number in range(60)]
    patience = Patience(tries=2, try_s=30.0, longest_pause_s=0.02)
    with serving(slow, limits=limits) as url:
        client = RemoteRewards([[url]], batch_size=2, patience=patience, say=lambda _: None)
        assert client.score(queries, queries)[0].rewards == [reward_of(query) for query in queries]
