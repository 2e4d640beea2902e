"""Actors are watched also while the driver runs code that does not wait for them."""

from __future__ import annotations

import os
import signal
import time

import pytest
import ray

from openrlhf.errors import DataError, InfraError
from openrlhf.ray.host import Sign
from openrlhf.ray.watch import Watch, Watched


@ray.remote(num_cpus=0, max_restarts=0)
class Idle:
    """An actor that only lives."""

    def ping(self) -> Sign:
        return Sign(os.getpid(), None, 0)


@ray.remote(num_cpus=0, max_restarts=0)
class Stuck:
    """An actor that stands at one point of a call, and answers."""

    def ping(self) -> Sign:
        return Sign(os.getpid(), (1, "a point"), 0)


@pytest.fixture
def idle(local_ray):
    actor = Idle.remote()
    ray.get(actor.ping.remote())
    yield actor
    ray.kill(actor)


def test_an_actor_that_dies_while_a_function_runs_is_noticed_before_that_returns(idle):
    watch, losses = Watch(30.0), []
    watched = watch.add(idle, "the engine", lambda why: (losses.append(why), watch.forget(watched)))
    with watch.beside():
        ray.kill(idle)
        until = time.monotonic() + 5.0
        while not losses and time.monotonic() < until:
            time.sleep(0.05)
        assert losses and "the engine died" in losses[0]


def test_an_actor_that_nobody_replaces_ends_the_run_when_the_function_has_returned(idle):
    watch = Watch(30.0)
    watch.add(idle, "actor rank 0")
    with pytest.raises(InfraError, match="actor rank 0 died"), watch.beside():
        ray.kill(idle)
        time.sleep(5.0)


def test_what_the_function_raises_is_raised_and_nobody_looks_on(idle):
    watch = Watch(30.0)
    watched = watch.add(idle, "actor rank 0")
    with pytest.raises(DataError, match="no number"), watch.beside():
        raise DataError("no number")
    sign = watched.sign
    time.sleep(0.5)
    assert watched.sign is sign


@pytest.fixture
def stuck(local_ray):
    actor = Stuck.remote()
    ray.get(actor.ping.remote())
    yield actor
    ray.kill(actor)


def heard(watched: Watched, now: float) -> None:
    """Send a ping and take its answer, both at the time ``now``."""
    watched.ask(now)
    sign, until = watched.sign, time.monotonic() + 30.0
    while watched.sign is sign and time.monotonic() < until:
        watched.hear(now)
        time.sleep(0.01)


def test_a_call_hangs_when_answers_come_and_tell_of_no_headway(stuck):
    watched = Watched("the engine", stuck)
    watched.begin(0.0)
    heard(watched, 1.0)
    heard(watched, 10.0)
    assert watched.trouble(11.5, 10.0) == ""
    heard(watched, 11.5)
    assert "the engine made no headway for 10 s: the call hangs" in watched.trouble(11.5, 10.0)


def test_an_actor_that_falls_silent_in_a_call_is_said_to_be_silent(stuck):
    watched = Watched("the engine", stuck)
    watched.begin(0.0)
    heard(watched, 1.0)
    pid = watched.sign.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        watched.ask(3.0)
        watched.hear(3.0)
        assert watched.trouble(12.0, 10.0) == ""
        assert f"No sign of life from the engine for 10 s: stopped or hanging (process {pid})" in watched.trouble(
            13.0, 10.0
        )
    finally:
        os.kill(pid, signal.SIGCONT)
