"""What this machine is, and its random state."""

import io
import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

from openrlhf import device


def draw():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_device_and_backend_fit_together():
    assert (device.device_type(), device.backend()) in {("cpu", "gloo"), ("cuda", "nccl")}
    assert device.current_device().type == device.device_type()


def test_looking_for_a_gpu_imports_no_torch():
    program = "import sys; from openrlhf import device; print(device.gpu_present(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(device.gpu_present()), "False"]


def test_each_process_gets_its_share_of_the_cores_and_waits_passively():
    cores = device.cores()
    assert device.thread_environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert device.thread_environment(2 * cores)["OMP_NUM_THREADS"] == "1"
    assert device.thread_environment(0)["OMP_NUM_THREADS"] == str(cores)
    assert device.thread_environment(1)["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_thread_count_set_by_the_user_wins(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "7"})
    device.configure_threads(processes=1)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"])
def test_the_ranks_of_the_launcher_share_the_cores(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {name: str(device.cores())})
    device.configure_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_the_same_seed_gives_the_same_numbers():
    device.seed_everything(3)
    first = draw()
    device.seed_everything(3)
    assert draw() == first
    device.seed_everything(2**40)


def test_the_random_state_survives_a_file():
    device.seed_everything(3)
    random.gauss(0, 1), numpy.random.randn(), torch.randn(3)
    file = io.BytesIO()
    torch.save(device.rng_state(), file)
    expected = draw() + (random.gauss(0, 1), numpy.random.randn())
    file.seek(0)
    device.set_rng_state(torch.load(file, weights_only=True))
    assert draw() + (random.gauss(0, 1), numpy.random.randn()) == expected


def test_saving_the_random_state_does_not_start_cuda():
    device.set_rng_state(device.rng_state())
    assert device.device_type() == "cuda" or not torch.cuda.is_initialized()


@pytest.mark.skipif(device.device_type() == "cpu", reason="needs a GPU")
def test_only_the_current_gpu_is_part_of_the_random_state():
    device.current_device()
    torch.cuda.init()
    state = device.rng_state()
    expected = torch.rand(3, device="cuda")
    assert state["cuda"].dim() == 1
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_the_cache_can_be_emptied():
    device.empty_cache()


def test_asking_for_the_device_module_does_not_import_torch():
    program = "import sys, openrlhf.device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
