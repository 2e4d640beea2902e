"""One run a folder: a second one is refused and told by whom, and nobody has to clean up after a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import UsageError
from openrlhf.strategy.lock import LOCK, FolderLock
from openrlhf.trainer.setup import _claim
from tests.cli.supervised import ROOT, environment

HOLDER = """
import sys, time
from pathlib import Path
from openrlhf.strategy.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "--ckpt_path")
print(lock.acquire(), flush=True)
sys.stdin.read()
lock.release()
"""


def holder(folder):
    """Start a process that holds the lock of ``folder`` until its input ends; return it and the line it said."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], env=environment(), **pipes)
    return process, process.stdout.readline().strip()


@pytest.fixture
def held(tmp_path):
    process, said = holder(tmp_path)
    assert said == "None"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_with_process_machine_and_time_of_the_first(tmp_path, held):
    with pytest.raises(UsageError) as error:
        FolderLock(tmp_path, "--ckpt_path").acquire()
    message = str(error.value)
    assert f"process {held.pid} on {os.uname().nodename} (since {time.strftime('%Y-')}" in message
    assert str(tmp_path) in message and "--ckpt_path" in message


def test_the_lock_of_a_killed_run_is_taken_over_with_one_line(tmp_path, held):
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert (tmp_path / LOCK).exists()
    lock = FolderLock(tmp_path, "--ckpt_path")
    said = lock.acquire()
    assert said.startswith(f"took over {tmp_path} from process {held.pid} ") and said.endswith("which is gone")
    lock.release()


def test_the_lock_of_a_machine_that_went_down_is_taken_over_even_if_its_number_lives_again(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": os.getppid(), "host": "node7", "since": "2020-01-01 00:00:00"}))
    lock = FolderLock(tmp_path, "--ckpt_path")
    assert "on node7" in lock.acquire()
    lock.release()


@pytest.mark.parametrize("text", ["", "not json", "[1]", '{"pid": 1}'])
def test_a_lock_file_that_tells_nothing_does_not_stop_anyone(text, tmp_path):
    (tmp_path / LOCK).write_text(text)
    lock = FolderLock(tmp_path, "--ckpt_path")
    assert lock.acquire() == (f"took over {tmp_path} from another process, which is gone" if text else None)
    lock.release()


def test_the_lock_leaves_with_its_run_and_the_next_one_gets_it(tmp_path, held):
    held.stdin.close()
    assert held.wait(timeout=30) == 0
    assert list(tmp_path.iterdir()) == []
    process, said = holder(tmp_path)
    process.kill()
    process.wait()
    assert said == "None"


def test_reading_the_lock_does_not_give_it_back(tmp_path, held):
    lock = FolderLock(tmp_path, "--ckpt_path")
    for _ in range(2):
        with pytest.raises(UsageError):
            lock.acquire()
    lock.release()
    assert (tmp_path / LOCK).exists()


SECOND = """
import sys
from openrlhf.config.groups import CheckpointConfig, LoggingConfig
from openrlhf.config.supervised import SFTConfig
from openrlhf.cli.common import run
from openrlhf.trainer.setup import open_run

def train(config):
    with open_run(config, "train_sft") as opened:
        opened.say("it runs")
        if "--seed=1" in sys.argv:
            sys.stdin.read()

run(SFTConfig, train, "train_sft", argv=["--pretrain", "x", "--dataset", "y", "--output_key", "z", *sys.argv[1:]])
"""


def start(*flags):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SECOND, *flags], env=environment(), cwd=ROOT, **pipes)


def test_a_second_command_in_the_same_folder_ends_at_once_and_leaves_the_first_alone(tmp_path):
    flags = [f"--save_path={tmp_path / 'model'}", f"--ckpt_path={tmp_path / 'ckpt'}", "--save_steps=2"]
    first = start(*flags, "--seed=1")
    assert first.stdout.readline().strip() == "it runs"
    before = (tmp_path / "model_run" / "config.json").read_bytes()
    for elsewhere in ([], [f"--run_path={tmp_path / 'other'}"], [f"--ckpt_path={tmp_path / 'other'}"]):
        began = time.monotonic()
        second = start(*flags, *elsewhere)
        said, problem = second.communicate(timeout=60)
        assert (second.returncode, said) == (2, "")
        assert time.monotonic() - began < 5
        assert f"is in use by process {first.pid} on " in problem and "Traceback" not in problem
    assert (tmp_path / "model_run" / "config.json").read_bytes() == before
    first.kill()
    first.communicate()
    third = start(*flags)
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 0
    assert [line.split(" from ")[0] for line in said.splitlines()] == [
        f"took over {tmp_path / 'model_run'}",
        f"took over {tmp_path / 'ckpt'}",
        "it runs",
    ]
    assert not list(tmp_path.rglob(LOCK))


@pytest.mark.parametrize("spelled", ["{0}/run", "{0}/./run", "{0}/other/../run", "{0}/link"])
def test_a_folder_that_two_flags_spell_differently_is_locked_once(spelled, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("run")
    checkpoint = CheckpointConfig(save_path=str(tmp_path / "model"), ckpt_path=spelled.format(tmp_path))
    with ExitStack() as held:
        assert _claim(checkpoint, tmp_path / "run", held) == []
        assert (tmp_path / "run" / LOCK).exists()
        process, said = holder(tmp_path / "run")
        process.kill()
        process.wait()
    assert said == "" and not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("flag", ["save_path", "ckpt_path", "run_path"])
@pytest.mark.parametrize("place", ["file", "/proc/nowhere"], ids=["a file", "a disk that takes nothing"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_loads(flag, place, tmp_path):
    (tmp_path / "file").write_text("x")
    flags = [f"--{name}={tmp_path / name}" for name in ("save_path", "ckpt_path", "run_path") if name != flag]
    process = start(*flags, "--save_steps=2", f"--{flag}={tmp_path / place}")
    said, problem = process.communicate(timeout=60)
    assert (process.returncode, said) == (4, "")
    assert f"--{flag}" in problem and str(tmp_path / place) in problem and "Traceback" not in problem
    assert not list(tmp_path.rglob(".openrlhf*"))
