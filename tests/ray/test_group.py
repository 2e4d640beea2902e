"""Groups of workers on a real local Ray."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import pytest
import ray
import torch
from ray.util.placement_group import remove_placement_group

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import InfraError, NumericError, UsageError
from openrlhf.ray import cluster
from openrlhf.ray.group import RayGroup, Watch
from openrlhf.ray.host import ray_noset_visible_devices
from openrlhf.ray.slots import reserve
from openrlhf.ray.vllm_actor import see_devices
from openrlhf.trainer.ppo.groups import LocalGroup
from tests.ray.conftest import placement_of

pytestmark = pytest.mark.timeout(120)


class Adder:
    """A worker that needs no strategy."""

    def __init__(self, offset: int):
        self.offset = offset

    def add(self, left: list, right: list, scale: int = 1) -> list:
        return [scale * (one + two) + self.offset for one, two in zip(left, right, strict=True)]

    def total(self, values: list) -> int:
        return sum(values) + self.offset

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def fail(self, error: Exception) -> int:
        if os.environ["RANK"] == "1":
            raise error
        return 0

    def fail_while_others_work(self) -> None:
        if os.environ["RANK"] == "1":
            raise NumericError("the loss is nan")
        time.sleep(60)

    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))
        return 1

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Summing:
    """A worker with a strategy: its ranks form a process group."""

    def __init__(self, config, strategy, start: int):
        self.strategy = strategy
        self.start = start

    def sum_of_ranks(self) -> float:
        return self.strategy.comm.all_reduce(float(self.start + self.strategy.rank))


@contextmanager
def two_adders(resource: str):
    slots = reserve(placement_of(actors=2), resource, timeout_s=30)["actor"]
    workers = RayGroup.start("actor", slots, Watch(timeout_s=60, look_every_s=1))
    workers.get(workers.build(Adder, 100))
    yield workers
    remove_placement_group(slots.group)


@ray.remote
class Holder:
    """Has a device to itself."""

    def ready(self) -> None:
        """Return once it has it."""


@pytest.fixture(scope="module")
def group(local_ray):
    with two_adders(local_ray) as workers:
        yield workers


@pytest.fixture
def mortal_group(local_ray):
    with two_adders(local_ray) as workers:
        yield workers


def test_items_are_dealt_in_order_as_a_local_group_does(group):
    left, right = list(range(6)), list(range(10, 16))
    expected = LocalGroup(Adder(100)).map(Adder.add, left, right, scale=2)
    assert group.get(group.map(Adder.add, left, right, scale=2)) == expected


def test_one_item_a_worker_and_no_items_work_too(group):
    assert group.get(group.map(Adder.add, [1, 2], [3, 4])) == [104, 106]
    assert group.map(Adder.add, [], []) == []


def test_run_gives_one_result_a_worker(group):
    assert group.get(group.run(Adder.total, [1, 2, 3, 4])) == [103, 107]


def test_futures_and_tensors_go_from_worker_to_worker(group):
    first = group.map(Adder.add, [torch.ones(3), torch.zeros(3)], [1, 2])
    second = group.get(group.map("add", first, first))
    assert torch.equal(second[0], torch.full((3,), 304.0))


def test_columns_that_cannot_be_dealt_evenly_are_refused(group):
    with pytest.raises(ValueError, match="actor: columns of"):
        group.map(Adder.add, [1, 2, 3], [1, 2, 3])


def test_workers_know_their_rank_their_master_and_their_share_of_the_cores(group):
    first, second = group.get(group.run(Adder.environment))
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and first["MASTER_ADDR"] == second["MASTER_ADDR"]
    assert first["LOCAL_RANK"] == "0"
    assert first["OMP_WAIT_POLICY"] == "PASSIVE" and int(first["OMP_NUM_THREADS"]) >= 1


def test_our_own_errors_come_back_as_they_were(group):
    with pytest.raises(NumericError, match="the loss is nan"):
        group.get(group.run(Adder.fail, error=NumericError("the loss is nan")))
    with pytest.raises(UsageError) as refused:
        group.get(group.run(Adder.fail, error=UsageError(["--one", "--two"])))
    assert refused.value.problems == ["--one", "--two"]


def test_a_bug_in_a_worker_keeps_its_type_and_the_remote_traceback(group):
    with pytest.raises(KeyError, match="lost") as raised:
        group.get(group.run(Adder.fail, error=KeyError("lost")))
    assert "in fail" in str(raised.value.__cause__)


def test_an_error_travels_through_the_calls_that_depend_on_it(group):
    broken = group.run(Adder.fail, error=NumericError("the loss is nan"))
    with pytest.raises(NumericError, match="the loss is nan"):
        group.get(group.map(Adder.add, broken, [1, 2]))


def test_a_worker_that_nobody_asked_for_a_while_is_not_taken_for_one_that_hangs(group, monkeypatch):
    monkeypatch.setattr(group.watch, "timeout_s", 3)
    assert group.get(group.run(Adder.work, seconds=2)) == [1, 1]
    time.sleep(6)
    assert group.get(group.run(Adder.work, seconds=2)) == [1, 1]


def test_the_failure_or_the_death_of_one_rank_is_told_while_the_others_still_work(mortal_group):
    pids = mortal_group.get(mortal_group.run(Adder.pid))
    started = time.monotonic()
    with pytest.raises(NumericError):
        mortal_group.get(mortal_group.run(Adder.fail_while_others_work))
    work = mortal_group.run(Adder.sleep, seconds=30)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(InfraError, match=f"actor rank 1 died. Process {pids[1]} was ended by SIGKILL.* its log: /"):
        mortal_group.get(work)
    assert time.monotonic() - started < 25


def test_a_stopped_worker_is_named_after_the_deadline(group, monkeypatch):
    monkeypatch.setattr(group.watch, "timeout_s", 2)
    pids = group.get(group.run(Adder.pid))
    os.kill(pids[0], signal.SIGSTOP)
    try:
        with pytest.raises(InfraError, match="No sign of life from actor rank 0 for 2 s"):
            group.get(group.run(Adder.total, [1, 2]))
    finally:
        os.kill(pids[0], signal.SIGCONT)
    assert group.get(group.run(Adder.total, [1, 2])) == [101, 102]


def test_a_worker_that_hangs_in_a_call_is_named_and_one_that_works_is_waited_for(mortal_group):
    mortal_group.watch.timeout_s = 3
    assert mortal_group.get(mortal_group.run(Adder.work, seconds=5)) == [1, 1]
    started = time.monotonic()
    with pytest.raises(InfraError, match="actor rank 0 made no headway for 3 s.*actor rank 1 made no headway"):
        mortal_group.get(mortal_group.run(Adder.sleep, seconds=60))
    assert time.monotonic() - started < 15


def test_an_engine_picks_the_devices_of_its_seat_when_ray_leaves_the_list_alone(local_ray):
    @ray.remote(num_gpus=2, runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}})
    def devices() -> tuple[str, list]:
        see_devices(())
        return os.environ["CUDA_VISIBLE_DEVICES"], ray.get_gpu_ids()

    seen, own = ray.get(devices.remote())
    assert len(own) == 2 and seen == ",".join(str(number) for number in own)


def test_an_engine_whose_devices_do_not_answer_ends_the_wait_for_them(local_ray):
    placement = placement_of(actors=2, engines=1, tensor_parallel=2, colocate_all_models=True)
    shared = reserve(placement, local_ray, timeout_s=30)
    slots = shared["vllm"]
    assert len(set(slots.devices(0))) == 2
    holder = Holder.options(**{**shared["actor"].options(1), "num_gpus": 1}).remote()
    ray.get(holder.ready.remote(), timeout=60)
    with pytest.raises(InfraError, match="No answer within 2 s from devices 0, 1 .*others hold them"):
        slots.devices(0, timeout_s=2)
    remove_placement_group(slots.group)


def test_workers_with_a_strategy_form_one_process_group(local_ray):
    slots = reserve(placement_of(actors=2), local_ray, timeout_s=30)["actor"]
    workers = RayGroup.start("actor", slots, Watch(timeout_s=60))
    workers.get(workers.setup(Summing, PPOConfig(), start=10))
    assert workers.get(workers.run(Summing.sum_of_ranks)) == [21.0, 21.0]
    remove_placement_group(slots.group)


def test_a_shortage_of_devices_ends_in_a_table(local_ray):
    started = time.monotonic()
    with pytest.raises(InfraError) as short:
        reserve(placement_of(actors=64), local_ray, timeout_s=3)
    assert time.monotonic() - started < 30
    assert "wanted" in str(short.value) and "64" in str(short.value) and "actor x64" in str(short.value)


def test_workers_can_pick_their_device_when_ray_leaves_the_list_alone():
    assert ray_noset_visible_devices({"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"})
    assert ray_noset_visible_devices({"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "true"})
    assert not ray_noset_visible_devices({"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"})
    assert not ray_noset_visible_devices({})


def test_workers_get_settings_but_never_secrets(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    for secret in ("WANDB_API_KEY", "HF_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(secret, "canary")
    passed = cluster.worker_environment()
    assert passed["HF_HUB_OFFLINE"] == "1"
    assert passed["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1"
    assert "canary" not in passed.values()


def test_a_local_ray_leaves_no_token_that_other_clusters_would_then_ask_for(local_ray, home_of_ray):
    assert not (home_of_ray / ".ray").exists()


def test_a_local_ray_has_as_many_seats_as_the_run_wants(local_ray):
    assert local_ray == "GPU"
    assert ray.cluster_resources()["GPU"] == 4
