"""vLLM engines that die or hang, on a real Ray: their work is done again, and nobody can tell from the samples."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from openrlhf.errors import InfraError
from openrlhf.ray.engines import RayEngines, Seat
from openrlhf.ray.group import RayGroup, Watch
from openrlhf.ray.slots import reserve
from openrlhf.ray.weight_sync import RayWeightSync
from openrlhf.rollout.engine import CACHE, WEIGHTS
from openrlhf.rollout.types import Prompt, SamplingParams
from tests.helpers import tiny_folder
from tests.ray.conftest import placement_of
from tests.ray.test_weight_sync import PROMPTS, TinyPolicy, model_of
from tests.rollout.test_vllm_engine import gap

pytestmark = pytest.mark.timeout(300)
SAMPLING = SamplingParams(max_new_tokens=16, temperature=0.7, n=3, seed=3, step=1)


@pytest.fixture(scope="module")
def fleet(local_ray, tmp_path_factory):
    """One policy rank that has learned, and two engines that serve its weights as version 1."""
    slots = reserve(placement_of(actors=1, engines=2), local_ray, timeout_s=60)
    watch = Watch(timeout_s=120)
    policy, engines = RayGroup.start("actor", slots["actor"], watch), RayEngines(slots["vllm"], watch)
    folder = tiny_folder(tmp_path_factory.mktemp("policy"), tied=True, hidden=64, seed=0)
    watch.get(policy.build(TinyPolicy) + engines.setup(folder, dtype="float32", max_model_len=64))
    policy.get(policy.run(TinyPolicy.learn, seed=4))
    sync = RayWeightSync(policy, engines, bucket_bytes=20_000)
    sync.push(1)
    yield policy, engines, sync
    for each in slots.values():
        remove_placement_group(each.group)


def pid_of(seat: Seat) -> int:
    return ray.get(seat.actor.ping.remote(), timeout=60).pid


def kill_soon(seat: Seat) -> None:
    """Stop an engine, so that the next call stands in the middle, and kill it there."""
    pid = pid_of(seat)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(2.5, os.kill, (pid, signal.SIGKILL)).start()


def said(caplog, *words: str) -> bool:
    return any(all(word in message for word in words) for message in caplog.messages)


def test_the_prompts_of_an_engine_that_was_killed_are_answered_as_if_it_had_not_been(fleet, caplog):
    policy, engines, _ = fleet
    calm = engines.generate(PROMPTS, SAMPLING)
    kill_soon(engines.seats[1])
    pids = [pid_of(engines.seats[0])]
    with caplog.at_level(logging.INFO, logger="openrlhf.ray.engines"):
        disturbed = engines.generate(PROMPTS, SAMPLING)
    assert said(caplog, "vLLM engine 1 was lost while it was asked to answer prompts", "SIGKILL")
    assert said(caplog, "vLLM engine 1 serves again")
    assert disturbed == calm
    assert {rollout.policy_version for rollout in disturbed} == {1} and gap(model_of(4), disturbed) < 5e-6
    assert [pid_of(engines.seats[0])] == pids


@pytest.mark.full
def test_an_engine_that_dies_while_it_gets_weights_is_replaced_and_gets_them(fleet, caplog):
    policy, engines, sync = fleet
    policy.get(policy.run(TinyPolicy.learn, seed=5))
    kill_soon(engines.seats[0])
    with caplog.at_level(logging.INFO, logger="openrlhf.ray.engines"):
        sync.push(2)
    assert said(caplog, "vLLM engine 0 was lost while it was asked to update_weights")
    rollouts = engines.generate(PROMPTS, SAMPLING)
    assert {rollout.policy_version for rollout in rollouts} == {2} and gap(model_of(5), rollouts) < 5e-6


@pytest.mark.full
def test_an_engine_that_dies_while_nobody_asks_it_is_replaced_before_it_is_asked(fleet, caplog):
    policy, engines, sync = fleet
    policy.get(policy.run(TinyPolicy.learn, seed=4))
    sync.push(3)
    calm, pid = engines.generate(PROMPTS, SAMPLING), pid_of(engines.seats[0])
    os.kill(pid, signal.SIGKILL)
    with caplog.at_level(logging.INFO, logger="openrlhf.ray.engines"):
        policy.get(policy.run("wait", seconds=5))
        assert said(caplog, "vLLM engine 0 was lost;")
        assert engines.generate(PROMPTS, SAMPLING) == calm
    assert said(caplog, "vLLM engine 0 serves again")


@pytest.mark.full
def test_an_engine_that_dies_asleep_is_replaced_when_it_is_needed_again_and_not_before(fleet, caplog, monkeypatch):
    policy, engines, sync = fleet
    policy.get(policy.run(TinyPolicy.learn, seed=4))
    sync.push(4)
    calm, seat = engines.generate(PROMPTS, SAMPLING), engines.seats[0]
    monkeypatch.setitem(seat._model[1], "sleep", True)
    engines.sleep()
    lost = seat.actor
    os.kill(pid_of(seat), signal.SIGKILL)
    with caplog.at_level(logging.INFO, logger="openrlhf.ray.engines"):
        policy.get(policy.run("wait", seconds=5))
        assert said(caplog, "vLLM engine 0 was lost; a new one starts when it is needed", "SIGKILL")
        engines.sleep()
        assert seat.actor is lost and not seat.waits_for
        engines.wake_up(WEIGHTS)
        assert seat.actor is not lost
        engines.wake_up(CACHE)
        assert engines.generate(PROMPTS, SAMPLING) == calm
    assert said(caplog, "vLLM engine 0 serves again")


@pytest.mark.full
def test_a_stopped_engine_is_replaced_within_its_time(fleet, caplog):
    _, engines, _ = fleet
    calm, pid = engines.generate(PROMPTS, SAMPLING), pid_of(engines.seats[1])
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with caplog.at_level(logging.INFO, logger="openrlhf.ray.engines"):
        assert engines.generate(PROMPTS, SAMPLING) == calm
    print(f"a stopped engine: its answers came {time.monotonic() - began:.1f} s after the stop")
    assert said(caplog, "No sign of life from vLLM engine 1 for 10 s")
    assert not os.path.exists(f"/proc/{pid}"), "the stopped process is gone"


@pytest.mark.full
def test_what_this_process_holds_does_not_grow_with_the_engines_that_were_replaced(fleet):
    _, engines, _ = fleet
    held = []
    for _ in range(4):
        os.kill(pid_of(engines.seats[0]), signal.SIGKILL)
        engines.generate(PROMPTS, SAMPLING)
        held.append((len(os.listdir("/proc/self/fd")), threading.active_count(), len(engines.watch._watched)))
    assert held[3] <= held[1], held


@pytest.mark.full
def test_a_prompt_that_fails_one_engine_and_the_next_ends_the_run_with_its_name(fleet):
    _, engines, _ = fleet
    too_long = [Prompt(uid="17", text="", token_ids=tuple(range(60)) * 9)]
    with pytest.raises(
        InfraError, match="was lost 2 times while it was asked to answer prompts 17. .*maximum context length"
    ):
        engines.generate(too_long, SAMPLING)
