"""Runs of PPO on Ray that are struck: a signal to one of their processes while the driver is in a known phase."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cli.stopping import (
    SHARED_MEMORY,
    calm_environment,
    end_session,
    wait_for_line,
    wait_until_gone,
)
from tests.cli.supervised import ROOT

DRIVER = "driver"
PATIENCE_S = 270.0
"""How long a run may take; the machine may be busy with others, so it says nothing about the run."""


@dataclass(frozen=True)
class Struck:
    """What is known of a run that was struck.

    Attributes:
        code: its exit status.
        pid: the process that got the signal.
        seconds: from the signal to the line of the log that matched each of ``lines``, and to the end of the run.
        output: what it wrote to the terminal.
        log: its log.
    """

    code: int
    pid: int
    seconds: dict[str, float]
    output: str
    log: str


def strike(
    words: list[str], run_path: Path, phases: Sequence[str], whom: str, number: signal.Signals, lines: Sequence[str]
) -> Struck:
    """Run a command and send ``number`` to ``whom`` (``DRIVER``, or a name of the log) in the first of ``phases``
    that is met, as the log calls them; note when the log has each of ``lines``.

    Fails when the driver was in none of the phases, or when anything of the run outlives it.
    """
    shared, log = set(SHARED_MEMORY.iterdir()), run_path / "log.txt"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, env=calm_environment(), cwd=ROOT, start_new_session=True, **pipes)
    try:
        pid = _hit(process, log, phases, whom, number)
        seconds = _follow(process, log, lines)
        output, _ = process.communicate(timeout=PATIENCE_S)
        left = wait_until_gone(process.pid)
    finally:
        end_session(process)
    assert not left, f"still there: {left}\n{output}"
    assert set(SHARED_MEMORY.iterdir()) <= shared
    return Struck(process.returncode, pid, seconds, output, log.read_text(errors="replace"))


def _hit(process: subprocess.Popen, log: Path, phases: Sequence[str], whom: str, number: signal.Signals) -> int:
    for phase in phases:
        wait_for_line(process, log, f"phase: {phase}", timeout=PATIENCE_S)
        with _standing_still(process.pid):
            text = log.read_text(errors="replace")
            if re.findall(r"phase: (.*)", text)[-1] == phase:
                pid = process.pid if whom == DRIVER else int(re.findall(rf"{whom} is process (\d+)", text)[-1])
                os.kill(pid, number)
                return pid
    raise AssertionError(f"the driver was in none of {phases} when it was looked at")


@contextmanager
def _standing_still(pid: int):
    """Stop the driver inside, so that the phase it is in is known."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _follow(process: subprocess.Popen, log: Path, lines: Sequence[str]) -> dict[str, float]:
    """Wait for the end of the process; return when each of ``lines`` came, and the end, in seconds from now."""
    began, seconds = time.monotonic(), {}
    while process.poll() is None:
        text = log.read_text(errors="replace")
        passed = round(time.monotonic() - began, 1)
        seconds |= {line: passed for line in lines if line not in seconds and re.search(line, text)}
        assert passed < PATIENCE_S, f"the run does not end:\n{text[-3000:]}"
        time.sleep(0.05)
    return {**seconds, "end": round(time.monotonic() - began, 1)}
