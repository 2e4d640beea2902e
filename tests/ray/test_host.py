"""What counts as headway of a call: work of its thread, and bytes that move; not the answers to pings."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager

import pytest

from openrlhf.ray import cluster
from openrlhf.ray.host import HEADWAY_BYTES, Pulse


@contextmanager
def waiting_call():
    """A call whose thread waits for something that does not come; the value is its pulse."""
    pulse, begun, end = Pulse(), threading.Event(), threading.Event()

    def call():
        with pulse.during_call():
            begun.set()
            end.wait(30)

    thread = threading.Thread(target=call)
    thread.start()
    begun.wait(10)
    threading.Event().wait(0.2)
    yield pulse
    end.set()
    thread.join()


def test_a_call_that_waits_makes_no_headway_however_often_it_is_asked():
    with waiting_call() as pulse:
        signs = {pulse.sign().headway for _ in range(50)}
    assert len(signs) == 1 and pulse.sign().headway is None


@pytest.mark.parametrize("way", ["read", "written"])
def test_bytes_that_move_are_headway_of_a_call_that_waits(way, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(2 * HEADWAY_BYTES))
    with waiting_call() as pulse:
        before = pulse.sign().headway
        if way == "read":
            path.read_bytes()
        else:
            path.write_bytes(bytes(2 * HEADWAY_BYTES))
        assert pulse.sign().headway != before


@pytest.mark.parametrize(("gpu", "hint"), [(True, "this machine has one: RAY_ADDRESS=local"), (False, "CPU cores")])
def test_a_cluster_without_gpus_is_said_in_one_line(gpu, hint, monkeypatch, caplog):
    monkeypatch.setattr("openrlhf.device.gpu_present", lambda: gpu)
    with caplog.at_level(logging.WARNING, logger="openrlhf.ray.cluster"):
        assert cluster._slot({"CPU": 16.0, "GPU": 2.0}, 8) == "GPU" and caplog.messages == []
        assert cluster._slot({"CPU": 16.0}, 8) == "CPU"
    (said,) = caplog.messages
    assert "no GPU" in said and "8 device slots" in said and hint in said and ("RAY_ADDRESS" in said) == gpu
