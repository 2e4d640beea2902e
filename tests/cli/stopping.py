"""Runs that are asked to stop: send a signal when the log names a phase, and look at what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cli.supervised import ROOT, environment

EXITS_WITHIN_S = 25.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Stopped:
    """What is known of a run that was asked to stop.

    Attributes:
        code: exit status of the command.
        seconds: from the signal to the end of the last of its processes.
        phases: the phase lines of its log.
        output: what it wrote to the terminal.
    """

    code: int
    seconds: float
    phases: list[str]
    output: str

    @property
    def step(self) -> int:
        """The step after which the run says it stopped."""
        found = re.search(r"stopped by .* after step (\d+)", self.output)
        return int(found[1]) if found else 0


def stop_at(
    words: list[str], log: Path, phase: str, *, number: int = signal.SIGTERM, whom=None, again_s: float | None = None
) -> Stopped:
    """Run a command and send ``number`` when its log has a line that matches ``phase``.

    ``whom(pid)`` returns the process that gets it (default: the command's own); ``again_s`` sends a second one so many
    seconds later. Fails unless every process of the run ends, and nothing new stays in shared memory.
    """
    shared = set(SHARED_MEMORY.iterdir())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, start_new_session=True, **pipes)
    try:
        wait_for_line(process, log, phase)
        asked = time.monotonic()
        os.kill(whom(process.pid) if whom else process.pid, number)
        if again_s is not None:
            time.sleep(again_s)
            os.kill(process.pid, number)
        output, _ = process.communicate(timeout=120)
        seconds = time.monotonic() - asked
        left = wait_until_gone(process.pid)
    finally:
        if process.poll() is None or alive_in(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert not left, f"still there: {left}"
    assert set(SHARED_MEMORY.iterdir()) <= shared
    phases = re.findall(r"phase: (.*)", log.read_text()) if log.exists() else []
    return Stopped(process.returncode, seconds, phases, output)


def wait_for_line(process: subprocess.Popen, log: Path, phase: str, timeout: float = 120) -> None:
    """Return as soon as ``log`` has a line that matches ``phase``."""
    end = time.monotonic() + timeout
    while not (log.exists() and re.search(phase, log.read_text(errors="replace"))):
        assert process.poll() is None, f"ended before {phase!r}: {process.stdout.read()}"
        assert time.monotonic() < end, f"no {phase!r} in {log}"
        time.sleep(0.002)


def wait_until_gone(session: int, timeout: float = 5.0) -> list[str]:
    """Return the processes of a session that are still there after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while alive_in(session) and time.monotonic() < end:
        time.sleep(0.1)
    return alive_in(session)


def alive_in(session: int) -> list[str]:
    """Return pid and command of every process of a session; a dead one that nobody collected does not count."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(f"{folder.name} {command}")
    return found
