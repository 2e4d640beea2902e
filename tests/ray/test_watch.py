"""Actors are watched also while the driver runs code that does not wait for them."""

from __future__ import annotations

import os
import time

import pytest
import ray

from openrlhf.errors import DataError, InfraError
from openrlhf.ray.host import Sign
from openrlhf.ray.watch import Watch


@ray.remote(num_cpus=0, max_restarts=0)
class Idle:
    """An actor that only lives."""

    def ping(self) -> Sign:
        return Sign(os.getpid(), None, 0)


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
