"""What a person sees: our lines on the terminal, the noise of libraries in the log, a summary that is right."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from openrlhf.config.groups import DeepSpeedConfig, run_folder
from openrlhf.config.supervised import KDConfig
from openrlhf.trainer.console import Console
from openrlhf.trainer.setup import frozen_line

NOISY = """
import ctypes, logging, os, sys, warnings
from openrlhf.config.groups import CheckpointConfig, LoggingConfig
from openrlhf.config.supervised import SFTConfig
from openrlhf.trainer.setup import open_run

config = SFTConfig(checkpoint=CheckpointConfig(save_path={save!r}), logging=LoggingConfig(use_wandb="secret-key"))
with open_run(config, "train_sft") as run:
    run.say("one of our lines")
    logging.getLogger("openrlhf.datasets").warning("a notice of ours")
    logging.getLogger("transformers").warning("library noise 1")
    warnings.warn("library noise 2")
    print("library noise 3")
    os.system("echo library noise 4")
    ctypes.CDLL(None).puts(b"library noise 5")
    ctypes.CDLL(None).fflush(None)
    {ending}
print("after the run")
"""


def run_noisy(save, ending="pass", **environment):
    code = NOISY.format(save=str(save), ending=ending)
    env = {**os.environ, "PYTHONPATH": os.getcwd(), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)


def test_noise_goes_to_the_log_and_our_lines_to_the_terminal(tmp_path):
    done = run_noisy(tmp_path / "model")
    assert done.stdout.splitlines() == ["one of our lines", "a notice of ours", "after the run"]
    assert done.stderr == ""
    log = (tmp_path / "model_run" / "log.txt").read_text()
    assert all(f"library noise {number}" in log for number in range(1, 6))
    assert "one of our lines" in log


def test_an_error_is_raised_on_with_its_traceback_in_the_log_and_the_terminal_restored(tmp_path):
    done = run_noisy(tmp_path / "model", ending="raise KeyError('something rare')")
    assert done.returncode == 1
    assert "KeyError: 'something rare'" in done.stderr
    assert "KeyError: 'something rare'" in (tmp_path / "model_run" / "log.txt").read_text()


def test_a_rank_that_is_not_the_first_is_silent_and_has_its_own_log(tmp_path):
    done = run_noisy(tmp_path / "model", RANK="1")
    assert done.stdout.splitlines() == ["after the run"]
    assert "library noise 1" in (tmp_path / "model_run" / "log.rank1.txt").read_text()
    assert not (tmp_path / "model_run" / "config.json").exists()


def test_the_saved_configuration_has_the_flags_and_not_the_key(tmp_path):
    run_noisy(tmp_path / "model")
    text = (tmp_path / "model_run" / "config.json").read_text()
    assert "secret-key" not in text
    saved = json.loads(text)
    assert saved["program"] == "train_sft"
    assert saved["zero_stage"] == 2
    assert saved["save_path"] == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("save_path", "explicit", "expected"),
    [("ckpt", None, "ckpt_run"), ("ckpt/", None, "ckpt_run"), ("ckpt", "elsewhere", "elsewhere")],
)
def test_the_run_folder_stands_beside_the_model_unless_named(save_path, explicit, expected):
    assert run_folder(save_path, explicit) == expected


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_a_status_updates_itself_on_a_terminal_and_lines_push_it_down():
    terminal = Terminal()
    console = Console(terminal)
    console.status("step 1")
    console.line("a line")
    console.status("step 2")
    console.settle()
    assert terminal.getvalue().replace("\x1b[2K", "") == "\rstep 1\ra line\nstep 1\rstep 2\n"


def test_off_a_terminal_a_status_is_a_line_now_and_then():
    stream = io.StringIO()
    console = Console(stream)
    for step in range(5):
        console.status(f"step {step}", at_once=step == 4)
    console.settle()
    assert stream.getvalue().splitlines() == ["step 0", "step 4"]


@pytest.mark.parametrize(
    ("stage", "offload", "size"),
    [
        (2, True, "4.0 MiB more a rank"),
        (3, False, "2.0 MiB more a rank"),
        (3, True, "2.0 MiB more a rank in main memory"),
    ],
)
def test_a_model_that_never_learns_is_shared_and_kept_in_main_memory_at_stage_three_only(stage, offload, size):
    config = KDConfig(deepspeed=DeepSpeedConfig(zero_stage=stage))
    line = frozen_line(config, 2, "larger", "--teacher_model", nn.Linear(1024, 1024, bias=False), offload)
    assert line == f"frozen   larger (--teacher_model): 1,048,576 parameters; about {size}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_terminal_that_takes_nothing_more_does_not_stop_the_run():
    with open("/dev/full", "w") as stream:
        console = Console(stream)
        console.line("a line")
        console.status("a status", at_once=True)
        console.settle()
        with contextlib.suppress(OSError):
            stream.close()
