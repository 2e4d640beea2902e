"""What is left of a Ray is ended when the program that started it is gone, however that ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from openrlhf.ray.guard import start_time

PROGRAM = """
import os, subprocess, sys, time
from openrlhf.ray.guard import watch_over
stubborn = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"])
watch_over([stubborn.pid])
print(stubborn.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked"])
def test_what_outlives_a_program_is_killed_soon(number):
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    stubborn = max(int(program.stdout.readline()), int(program.stdout.readline()))
    assert start_time(stubborn)
    os.kill(program.pid, number)
    program.wait(timeout=10)
    end = time.monotonic() + 10
    while start_time(stubborn) and time.monotonic() < end:
        time.sleep(0.05)
    assert not start_time(stubborn)
    program.stdout.close()


def test_a_process_of_the_same_number_that_was_started_later_is_left_alone():
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    guard = [sys.executable, "-I", "-S", sys.modules[start_time.__module__].__file__, f"{other.pid}/1"]
    subprocess.run(guard, stdin=subprocess.DEVNULL, timeout=20, check=True)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_that_ended_has_no_start_time():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert start_time(ended.pid) == ""
