"""Every schedule of ``--lr_scheduler`` starts at the learning rate; nobody waits for a compiler that is gone."""

import os
import threading
import time

import pytest
from torch import nn

from openrlhf.config.groups import SCHEDULERS, OptimConfig
from openrlhf.errors import InfraError
from openrlhf.strategy import optimizer as optimizers
from openrlhf.strategy.optimizer import build_optimizer, build_schedule, cpu_adam_is_available, wait_for_compiler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_starts_at_the_learning_rate_and_never_exceeds_it(name):
    config = OptimConfig(learning_rate=1e-3, lr_scheduler=name, lr_warmup_ratio=0.0)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-3) and max(rates) == rates[0]
    assert ("constant" in name) == (rates[-1] == rates[0])


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock that torch's compiler takes for DeepSpeed's CPU Adam, as a killed process leaves it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_the_lock_of_a_compilation_that_was_killed_is_named_at_once(lock):
    long_ago = time.time() - optimizers.COMPILE_S - 1
    os.utime(lock, (long_ago, long_ago))
    began = time.monotonic()
    with pytest.raises(InfraError, match=rf"--adam_offload: {lock} .* delete that file"):
        cpu_adam_is_available()
    assert time.monotonic() - began < 30 and lock.exists()


def test_a_younger_lock_is_waited_for_until_it_is_as_old(lock, monkeypatch, caplog):
    monkeypatch.setattr(optimizers, "COMPILE_S", 1.0)
    caplog.set_level("INFO")
    began = time.monotonic()
    with pytest.raises(InfraError, match="delete that file"):
        cpu_adam_is_available()
    assert 0.5 < time.monotonic() - began < 30
    assert [str(lock) in line for line in caplog.messages] == [True]


def test_another_process_that_compiles_now_is_waited_for(lock):
    threading.Timer(0.5, lock.unlink).start()
    began = time.monotonic()
    wait_for_compiler(lock)
    assert time.monotonic() - began > 0.4 and not lock.exists()


def test_without_a_lock_nobody_waits(lock, caplog):
    caplog.set_level("INFO")
    lock.unlink()
    wait_for_compiler(lock)
    assert caplog.messages == []
