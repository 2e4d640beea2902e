"""Who is missing at a barrier is known at its deadline, or before it where a rank is gone; a slow one is awaited."""

import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from openrlhf.errors import InfraError
from openrlhf.strategy import barrier, heartbeat
from openrlhf.strategy.barrier import Barriers
from openrlhf.strategy.heartbeat import Heartbeat


@pytest.fixture
def ranks(monkeypatch):
    """The store and the heartbeats of two ranks, which are threads of this process."""
    monkeypatch.setattr(barrier, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.1)
    monkeypatch.setattr(heartbeat, "LISTEN_S", 0.5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    beats = [Heartbeat(store, rank, 2) for rank in range(2)]
    yield store, beats
    for beat in beats:
        beat.stop()


def waited(store, beat, limit_s=20.0):
    """Return what rank 0 is told at a barrier, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(InfraError) as error:
        Barriers(store, beat).wait("the test", limit_s)
    return str(error.value), time.monotonic() - began


def ended_process() -> int:
    """Return the number of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_ranks_that_come_pass_one_barrier_after_the_other(ranks):
    store, beats = ranks
    sides, order = [Barriers(store, beat) for beat in beats], []

    def second():
        for step in range(3):
            time.sleep(0.3)
            order.append(f"1 comes to {step}")
            sides[1].wait(f"step {step}", 20.0)

    thread = threading.Thread(target=second)
    thread.start()
    for step in range(3):
        sides[0].wait(f"step {step}", 20.0)
        order.append(f"0 passed {step}")
    thread.join()
    assert all(order.index(f"1 comes to {step}") < order.index(f"0 passed {step}") for step in range(3))


def test_at_the_deadline_the_missing_rank_is_named(ranks):
    store, beats = ranks
    message, seconds = waited(store, beats[0], 1.0)
    assert message == "rank 0 waited 1 s at the barrier 'the test' for ranks [1] of 2 (--collective_timeout)"
    assert 1.0 <= seconds < 3.0


def test_a_rank_whose_process_has_ended_is_named_long_before_the_deadline(ranks):
    store, beats = ranks
    beats[1].stop()
    store.set("process/1", f"{heartbeat.here()} {ended_process()}")
    message, seconds = waited(store, beats[0])
    assert "at the barrier 'the test' for rank 1: no sign of life" in message and seconds < 5.0


def test_a_silent_rank_whose_process_is_there_is_waited_for(ranks):
    """A library may hold all threads of a process back, that of the signs of life too."""
    store, beats = ranks
    beats[1].stop()
    late = threading.Timer(2.0, lambda: Barriers(store, beats[1]).wait("the test", 20.0))
    late.start()
    Barriers(store, beats[0]).wait("the test", 20.0)
    late.join()


def test_a_rank_on_another_machine_is_given_up_when_it_is_silent_for_long(ranks, monkeypatch):
    store, beats = ranks
    beats[1].stop()
    store.set("process/1", f"elsewhere {ended_process()}")
    message, seconds = waited(store, beats[0], 2.0)
    assert "ranks [1] of 2 (--collective_timeout)" in message
    monkeypatch.setattr(heartbeat, "SILENT_S", 1.0)
    message, seconds = waited(dist.PrefixStore("again", store), beats[0])
    assert "rank 1: no sign of life" in message and seconds < 5.0


def test_a_store_that_does_not_answer_ends_the_wait_too(ranks):
    class Stopped(dist.Store):
        def set(self, key, value):
            time.sleep(60)

    message, seconds = waited(Stopped(), ranks[1][1], 0.5)
    assert "rank 0, where the ranks meet, which does not answer" in message and seconds < 5.0


def test_a_store_that_is_gone_ends_the_wait_at_once(ranks):
    class Gone(dist.Store):
        def set(self, key, value):
            raise dist.DistNetworkError("Connection reset by peer")

    message, seconds = waited(Gone(), ranks[1][1])
    assert "rank 0, where the ranks meet, which is gone: Connection reset" in message and seconds < 5.0


def test_a_rank_goes_on_telling_that_it_lives_when_the_store_failed_once(monkeypatch):
    class Flaky(dist.Store):
        sets = 0

        def clone(self):
            return self

        def set(self, key, value):
            self.sets += 1
            if self.sets == 4:
                raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(heartbeat, "EVERY_S", 0.05)
    store = Flaky()
    beat = Heartbeat(store, 0, 1)
    time.sleep(1.0)
    beat.stop()
    assert store.sets > 6
