"""Reward servers that behave and that do not: every reward is the true one, or there is an error."""

from __future__ import annotations

import json
import random
import socket
import threading
import time

import pytest

from openrlhf.errors import DataError, InfraError, NumericError
from openrlhf.rollout.reward_client import RemoteRewards
from openrlhf.rollout.reward_request import Patience
from tests.rollout import fake_reward_server as fake
from tests.rollout.fake_reward_server import FakeRewardServer, reward_of

QUERIES = [f"question {number}: answer{'!' * number}" for number in range(8)]
PROMPTS = [query.split(":")[0] for query in QUERIES]
LABELS = [str(number) for number in range(8)]
UIDS = [f"u{number}" for number in range(8)]
TRIES = 3
QUICK = Patience(tries=TRIES, try_s=0.7, connect_s=0.5, pause_s=0.01, longest_pause_s=0.05)


def client(*sources, patience=QUICK, **options):
    return RemoteRewards(
        [[urls] if isinstance(urls, str) else urls for urls in sources],
        patience=patience,
        say=lambda _: None,
        **options,
    )


def ask(*sources, **options):
    """Return the rewards that each source gives for QUERIES."""
    results = client(*sources, **options).score(QUERIES, PROMPTS, LABELS, UIDS)
    return [result.rewards for result in results]


TRUE = [reward_of(query) for query in QUERIES]
NOT_JSON = "the answer is no JSON"
# mode: what the server does; the error, None for the true rewards; how many requests it got; what the message says.
MODES = {
    "200": (fake.good, None, 1, ""),
    "500": (fake.status(500), InfraError, TRIES, "status 500"),
    "502": (fake.status(502), InfraError, TRIES, "status 502"),
    "503 with Retry-After": (fake.fails(2, fake.status(503, Retry_After="0")), None, 3, ""),
    "429": (fake.fails(4, fake.status(429, Retry_After="0")), None, 5, ""),
    "400": (fake.status(400), DataError, 1, "refuses the request with status 400"),
    "401": (fake.status(401), DataError, 1, "refuses the key .status 401.*--remote_rm_key"),
    "404": (fake.status(404), DataError, 1, "status 404"),
    "302 to another host": (fake.status(302, Location="http://127.0.0.2:9/"), DataError, 1, "redirect.*302"),
    "refuse": (None, InfraError, 0, "after 3 tries.*is the server.*running|Connect"),
    "reset in the body": (fake.reset, InfraError, TRIES, "ClientPayloadError"),
    "hang before the headers": (fake.hang, InfraError, TRIES, "no whole answer within 0.7 s"),
    "drip": (fake.drip_body, InfraError, TRIES, "no whole answer within 0.7 s"),
    "HTML": (fake.body("<html>Welcome</html>", "text/html"), InfraError, TRIES, f"{NOT_JSON}: <html>Welcome"),
    "truncated JSON": (fake.truncated, InfraError, TRIES, NOT_JSON),
    "{}": (fake.body("{}"), DataError, 1, "keys of its answer: none"),
    "null": (fake.body("null"), DataError, 1, "it gave null"),
    "wrong key": (fake.body('{"reward": [1, 2]}'), DataError, 1, "keys of its answer: reward"),
    "n - 1 rewards": (fake.rewards(lambda right: right[:-1]), DataError, 1, "give 8 rewards, one a query; it gave 7"),
    "n + 1 rewards": (fake.rewards(lambda right: [*right, 0.0]), DataError, 1, "8 rewards, one a query; it gave 9"),
    "strings": (fake.rewards(lambda right: list(map(str, right))), DataError, 1, "uid u0 got string"),
    "nested lists": (fake.rewards(lambda right: [[value] for value in right]), DataError, 1, "uid u0 got list"),
    "NaN": (fake.rewards(lambda right: [*right[:-1], float("nan")]), NumericError, 1, "not finite: uid u7: nan"),
    "Infinity": (fake.rewards(lambda right: [float("inf"), *right[1:]]), NumericError, 1, "not finite: uid u0: inf"),
    "1e40": (fake.rewards(lambda right: [*right[:3], 1e40, *right[4:]]), NumericError, 1, "uid u3: 1e[+]40"),
    "200 MB": (fake.huge, DataError, 1, "more than 16 MiB"),
    "fails twice, then well": (fake.fails(2), None, 3, ""),
}
MORE_MODES = {
    "429 for ever": (fake.status(429), InfraError, None, "status 429"),
    "408": (fake.fails(1, fake.status(408)), None, 2, ""),
    "201": (fake.status(201), DataError, 1, "status 201"),
    "204": (fake.status(204), DataError, 1, "status 204"),
    "drip of headers": (fake.drip_headers, InfraError, TRIES, "tries"),
    "no HTTP": (fake.not_http, InfraError, TRIES, "tries"),
    "nothing": (fake.body(""), InfraError, TRIES, NOT_JSON),
    "a list": (fake.body("[1, 2, 3, 4, 5, 6, 7, 8]"), DataError, 1, "it gave list"),
    "one number": (fake.rewards(lambda right: 1.0), DataError, 1, "it gave one number"),
    "one reward": (fake.rewards(lambda right: right[:1]), DataError, 1, "it gave 1$"),
    "no rewards": (fake.rewards(lambda right: []), DataError, 1, "it gave 0$"),
    "one null": (fake.rewards(lambda right: [None, *right[1:]]), DataError, 1, "uid u0 got null"),
    "booleans": (fake.rewards(lambda right: [True] * 8), DataError, 1, "uid u0 got boolean"),
    "-Infinity": (fake.rewards(lambda right: [-float("inf"), *right[1:]]), NumericError, 1, "uid u0: -inf"),
    "a giant integer": (fake.rewards(lambda right: [10**400, *right[1:]]), NumericError, 1, "uid u0: inf"),
    "deep JSON": (fake.body("[" * 100_000), InfraError, TRIES, NOT_JSON),
    "no UTF-8": (lambda handler, _: fake.send(handler, b"\xff\xfe\x00"), InfraError, TRIES, NOT_JSON),
    "gzip": (lambda handler, _: fake.send(handler, b"\x1f\x8b\x08", Content_Encoding="gzip"), InfraError, 3, NOT_JSON),
    "a log of two": (fake.body(f'{{"rewards": {TRUE}, "extra_logs": {{"a": [1, 2]}}}}'), DataError, 1, "8 a.*gave 2$"),
    "logs in a list": (
        fake.body(f'{{"rewards": {TRUE}, "extra_logs": [1]}}'),
        DataError,
        1,
        "object of lists; found list",
    ),
}


def closed_address() -> str:
    """Return an address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/get_reward"


@pytest.mark.parametrize("name", [*MODES, *MORE_MODES])
def test_whatever_a_server_does_the_rewards_are_right_or_there_is_a_clear_error(name):
    mode, error, requests, says = {**MODES, **MORE_MODES}[name]
    with FakeRewardServer(mode or fake.good) as server:
        url = server.url if mode else closed_address()
        started = time.monotonic()
        if error is None:
            assert ask(url) == [TRUE]
        else:
            with pytest.raises(error, match=f"(?si){says}") as caught:
                ask(url)
            assert url in str(caught.value)
        assert time.monotonic() - started < TRIES * QUICK.try_s + 2.5
        assert requests is None or len(server.requests) == requests


def test_a_request_is_what_openrlhf_sends(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", closed_address())
    monkeypatch.setenv("ALL_PROXY", closed_address())
    with FakeRewardServer(fake.good) as server:
        assert ask(server.url, key="s3cret") == [TRUE]
        assert client(server.url).score(QUERIES[:1], PROMPTS[:1])[0].rewards == TRUE[:1]
    assert server.requests[0] == {"query": QUERIES, "prompts": PROMPTS, "labels": LABELS}
    assert server.headers[0]["Content-Type"] == "application/json"
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.requests[1] == {"query": QUERIES[:1], "prompts": PROMPTS[:1], "labels": [""]}
    assert "Authorization" not in server.headers[1]


def test_rewards_of_zero_are_rewards():
    with FakeRewardServer(fake.rewards(lambda right: [0] * len(right))) as server:
        assert ask(server.url) == [[0.0] * 8]


def test_scores_and_logs_come_with_the_rewards_over_all_requests():
    def mode(handler, request):
        lengths = [len(query) for query in request["query"]]
        logs = {"length": lengths, "mean": 0.5}
        fake.send(handler, json.dumps({"rewards": lengths, "scores": [1] * len(lengths), "extra_logs": logs}).encode())

    with FakeRewardServer(mode) as server:
        (result,) = client(server.url, batch_size=3).score(QUERIES, PROMPTS)
    lengths = [float(len(query)) for query in QUERIES]
    assert result.rewards == lengths
    assert result.extra == {"length": lengths, "mean": [0.5] * 8, "scores": [1.0] * 8}
    assert sorted(len(request["query"]) for request in server.requests) == [2, 3, 3]


def test_logs_that_only_some_answers_bring_are_an_error():
    def mode(handler, request):
        logs = {"extra_logs": {"a": 1.0}} if QUERIES[0] in request["query"] else {}
        fake.send(handler, json.dumps({"rewards": [0.0] * len(request["query"]), **logs}).encode())

    with FakeRewardServer(mode) as server, pytest.raises(DataError, match="'extra_logs' for some queries only: a;"):
        ask(server.url, batch_size=4)


def test_answers_in_any_order_reach_the_queries_that_they_belong_to():
    delays = random.Random(1)

    def mode(handler, request):
        time.sleep(delays.uniform(0.0, 0.02))
        fake.good(handler, request)

    queries = [f"text {number} {'x' * (number % 17)}" for number in range(500)]
    with FakeRewardServer(mode) as one, FakeRewardServer(mode) as other:
        results = client([one.url, other.url], batch_size=3).score(queries, queries)
        both = client(one.url, other.url, batch_size=50).score(queries, queries)
    expected = [reward_of(query) for query in queries]
    assert [result.rewards for result in results] == [expected]
    assert [result.rewards for result in both] == [expected, expected]
    shares = [sum(len(request["query"]) == 3 for request in server.requests) for server in (one, other)]
    assert min(shares) > 40, "replicas share the work"


def test_every_source_is_asked_for_every_query_and_replicas_only_once():
    with FakeRewardServer(fake.good) as one, FakeRewardServer(fake.rewards(lambda right: [2.0] * len(right))) as other:
        assert ask(one.url, other.url) == [TRUE, [2.0] * 8]
        assert [len(server.requests) for server in (one, other)] == [1, 1]
        client([one.url, other.url, closed_address()]).score(QUERIES[:1], PROMPTS[:1])
        assert len(one.requests) + len(other.requests) == 3, "one request for one query, whatever the replicas"


@pytest.mark.parametrize("mode", [fake.hang, fake.status(500), None], ids=["hangs", "fails", "is gone"])
def test_another_replica_takes_over(mode):
    with FakeRewardServer(mode or fake.good) as ill, FakeRewardServer(fake.good) as well:
        asked = client([ill.url if mode else closed_address(), well.url], batch_size=1)
        started = time.monotonic()
        assert asked.score(QUERIES, PROMPTS)[0].rewards == TRUE
        first, requests = time.monotonic() - started, len(ill.requests)
        assert asked.score(QUERIES, PROMPTS)[0].rewards == TRUE
    assert first < 2 * QUICK.try_s + 1
    assert len(ill.requests) == requests, "the second time the healthy one is asked first"


def test_a_server_that_is_busy_costs_no_tries_for_as_long_as_one_may_take():
    busy = fake.fails(TRIES + 5, fake.status(503, Retry_After="0"))
    with FakeRewardServer(busy) as server:
        assert ask(server.url, patience=Patience(TRIES, 20.0, 0.5, 0.01, 0.05)) == [TRUE]
    assert len(server.requests) == TRIES + 6


def test_waiting_for_the_requests_before_it_costs_a_request_no_patience():
    def mode(handler, request):
        if handler.number <= 8:
            time.sleep(1.2)
        busy = 8 < handler.number <= 12
        (fake.status(429, Retry_After="0") if busy else fake.good)(handler, request)

    queries = [f"text {number}" for number in range(12)]
    with FakeRewardServer(mode) as server:
        asked = client(server.url, batch_size=1, patience=Patience(1, 2.0, longest_pause_s=0.05))
        assert asked.score(queries, queries)[0].rewards == [reward_of(query) for query in queries]
    assert len(server.requests) == 16


def test_the_pause_is_the_one_that_the_server_asks_for():
    with FakeRewardServer(fake.fails(1, fake.status(503, Retry_After="1"))) as server:
        assert ask(server.url, patience=Patience(TRIES, 5.0, 0.5, 0.01, 30.0)) == [TRUE]
    assert 1.0 <= server.times[1] - server.times[0] < 3.0


def test_pauses_double_up_to_the_longest_and_have_a_jitter():
    patience = Patience()
    for failures, longest in ((1, 0.5), (2, 1.0), (5, 8.0), (12, 30.0)):
        pauses = {patience.pause(failures, None) for _ in range(50)}
        assert longest / 2 <= min(pauses) and max(pauses) <= longest and len(pauses) > 10
    assert patience.pause(1, 7.0) == 7.0 and patience.pause(1, 4000.0) == 30.0


def test_trouble_is_told_once_and_leaves_the_random_numbers_of_the_run_alone():
    told = []
    random.seed(5)
    expected = random.Random(5).random()
    with FakeRewardServer(fake.fails(2)) as server:
        asked = RemoteRewards([[server.url]], patience=QUICK, say=told.append)
        assert asked.score(QUERIES, PROMPTS)[0].rewards == TRUE
    assert len(told) == 1 and "status 500" in told[0] and server.url in told[0]
    assert random.random() == expected


def test_what_follows_a_question_mark_is_not_shown():
    with pytest.raises(InfraError) as caught:
        ask(closed_address() + "?key=s3cret", patience=Patience(1, 0.5, 0.5))
    assert "s3cret" not in str(caught.value) and "/get_reward" in str(caught.value)


def test_long_texts_travel_in_requests_of_their_own():
    queries = ["x" * 3_000_000, "é" * 500_000, "z"]
    with FakeRewardServer(fake.good) as server:
        patience = Patience(1, 20.0)
        rewards = client(server.url, patience=patience).score(queries, ["", "", ""])[0].rewards
    assert rewards == [reward_of(query) for query in queries]
    assert sorted(len(request["query"]) for request in server.requests) == [1, 2]


def test_a_call_from_another_thread_works():
    found = []
    with FakeRewardServer(fake.good) as server:
        thread = threading.Thread(target=lambda: found.extend(ask(server.url)))
        thread.start()
        thread.join(10)
    assert found == [TRUE]


def test_no_queries_need_no_request():
    assert client(closed_address()).score([], [])[0].rewards == []


def test_a_signal_interrupts_the_wait_and_the_next_call_works():
    with FakeRewardServer(fake.fails(1, fake.hang)) as server:
        asked = client(server.url, patience=Patience(1, 60.0))
        started = time.monotonic()
        with fake.interrupted_after(0.5), pytest.raises(KeyboardInterrupt):
            asked.score(QUERIES, PROMPTS)
        assert time.monotonic() - started < 20
        assert asked.score(QUERIES, PROMPTS)[0].rewards == TRUE
