"""How a process answers when it is asked to stop; each case is a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import os, signal, sys, threading, time
from openrlhf.errors import Preempted
from openrlhf.strategy import signals
def ready():
    print("ready", flush=True)
def wait(seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
signals.install()
"""


def asked(program: str, *numbers: signal.Signals, pause: float = 1.5) -> tuple[int, float, str]:
    """Run ``program``, send it ``numbers`` once it is ready; return exit status, seconds and what it printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HEAD + program], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for position, number in enumerate(numbers):
        time.sleep(pause if position else 0.0)
        process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    return process.returncode, time.monotonic() - began, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_the_start_a_signal_interrupts_what_runs(number):
    program = """
try:
    ready(); wait()
except KeyboardInterrupt:
    print(signals.requested())
"""
    code, seconds, output = asked(program, number)
    assert (code, output) == (0, f"{number.name}\n") and seconds < 5


def test_a_held_signal_waits_and_a_droppable_wait_hears_it():
    program = """
with signals.held():
    ready()
    while signals.requested() is None:
        time.sleep(0.01)
    signals.check()
    print("held")
    try:
        with signals.droppable():
            print("never")
    except Preempted:
        print("dropped")
    with signals.held():
        signals.check()
"""
    assert asked(program, signal.SIGTERM)[::2] == (0, "held\ndropped\n")


def test_code_that_never_asks_is_interrupted_where_that_is_allowed():
    program = """
with signals.held():
    try:
        with signals.interruptible():
            ready(); wait()
    except KeyboardInterrupt:
        print("left")
    try:
        with signals.interruptible():
            print("never")
    except Preempted:
        print("not entered")
"""
    assert asked(program, signal.SIGTERM)[::2] == (0, "left\nnot entered\n")


def test_a_second_signal_ends_a_process_that_waits_in_a_library():
    program = """
with signals.held():
    lock = threading.Lock(); lock.acquire(); ready(); lock.acquire()
"""
    code, seconds, output = asked(program, signal.SIGTERM, signal.SIGTERM)
    assert code == 143 and seconds < 5
    assert "once more" in output


def test_a_second_signal_ends_a_process_whose_terminal_is_gone():
    program = """
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 2)
signals._state.installed = False
signals.install()  # listens anew, with the terminal as it is now
with signals.held():
    ready(); wait()
"""
    code, seconds, _ = asked(program, signal.SIGTERM, signal.SIGTERM)
    assert code == 143 and seconds < 5


def test_a_second_signal_ends_the_children_and_theirs_too():
    program = """
import subprocess
child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
with signals.held():
    grandchild = child.stdout.readline().strip()
    ready(); print(grandchild, flush=True); wait()
"""
    code, _, output = asked(program, signal.SIGTERM, signal.SIGTERM)
    state = Path(f"/proc/{output.split()[0]}/stat")
    assert code == 143
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_same_request_told_twice_is_one():
    program = """
with signals.held():
    ready(); wait(2)
    print("whole", signals.requested())
"""
    assert asked(program, signal.SIGINT, signal.SIGTERM, pause=0.05)[::2] == (0, "whole SIGINT\n")


def test_a_start_up_that_is_deaf_is_ended_from_outside():
    program = """
import ctypes
signals.DEAF_S = 1.0
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the signal goes to another thread, and this one sleeps on
ready(); ctypes.CDLL(None).sleep(20)
"""
    code, seconds, output = asked(program, signal.SIGTERM)
    assert code == 143 and seconds < 10
    assert "before the first step" in output


@pytest.mark.parametrize("where", ["signals.interruptible()", "signals.droppable(), signals.interruptible()"])
def test_a_reward_function_or_a_restore_that_is_deaf_is_awaited_and_the_step_before_it_saved(where):
    program = f"""
import ctypes
signals.DEAF_S = 0.5
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
with signals.held():
    try:
        with {where}:
            ready(); ctypes.CDLL(None).sleep(5)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {{signal.SIGTERM}})
            wait()
    except KeyboardInterrupt:
        print("saved", flush=True)
"""
    code, seconds, output = asked(program, signal.SIGTERM)
    said, saved = output.splitlines()
    assert code == 0 and saved == "saved"
    assert said.startswith("asked to stop: waiting") and "first step" not in output


def test_handlers_that_a_library_took_are_taken_back():
    program = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
print(signals.is_installed())
with signals.held():
    print(signals.is_installed())
"""
    done = subprocess.run([sys.executable, "-c", HEAD + program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "False\nTrue\n", done.stderr


def test_a_forked_child_dies_of_a_signal_and_its_parent_does_not_hear_it():
    program = """
child = os.fork()
if child == 0:
    wait()
    os._exit(0)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signals.requested())
"""
    done = subprocess.run([sys.executable, "-c", HEAD + program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "-15 None\n", done.stderr


def test_a_rank_whose_launcher_is_gone_stops():
    program = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", INNER])
print(child.pid, flush=True)
wait()
"""
    inner = (
        HEAD.replace(
            "signals.install()", "signals._launchers = lambda: {os.getpid(): os.getppid()}\nsignals.install()"
        )
        + "try:\n    print('ready', flush=True); wait()\nexcept KeyboardInterrupt:\n    print('left', flush=True)\n"
    )
    words = [sys.executable, "-c", HEAD + f"INNER = {inner!r}\n" + program]
    outer = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert outer.stdout.readline().strip().isdigit()
    assert outer.stdout.readline() == "ready\n"
    outer.kill()
    assert outer.stdout.readline() == "left\n"
    outer.wait(timeout=10)
    outer.stdout.close()
