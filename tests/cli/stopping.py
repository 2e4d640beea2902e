"""Runs that are asked to stop: send a signal when a file names a phase, look at what is left, and go on from there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cli.supervised import ROOT, assert_same_weights, environment

EXITS_WITHIN_S = 25.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Stopped:
    """What is known of a run that was asked to stop.

    Attributes:
        code: exit status of the command.
        seconds: from the signal to the end of the last of its processes.
        last_phase: the last phase line of its log, without saves.
        saves: the steps that its log says were saved.
        output: what it wrote to the terminal.
    """

    code: int
    seconds: float
    last_phase: str
    saves: list[int]
    output: str

    @property
    def step(self) -> int:
        """The step after which the run says it stopped; 0 when it says none."""
        found = re.search(r"stopped by .* after step (\d+)", self.output)
        return int(found[1]) if found else 0


def stop_at(
    words: list[str],
    run_path: Path,
    when: tuple[Path, str],
    number: signal.Signals = signal.SIGTERM,
    whom: Callable[[int], int] = int,
    again_s: float | None = None,
) -> Stopped:
    """Run a command and send it ``number`` once the file ``when[0]`` has a line that matches ``when[1]``.

    ``whom(pid)`` returns the process that gets the signal, the command's own by default; ``again_s`` sends another so
    many seconds later. Fails unless every process of the run ends and shared memory is as it was.
    """
    shared = set(SHARED_MEMORY.iterdir())
    log = run_path / "log.txt"
    log.unlink(missing_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, env=calm_environment(), cwd=ROOT, start_new_session=True, **pipes)
    try:
        wait_for_line(process, *when)
        asked = time.monotonic()
        os.kill(whom(process.pid), number)
        if again_s is not None:
            time.sleep(again_s)
            os.kill(whom(process.pid), number)
        output, _ = process.communicate(timeout=120)
        left = wait_until_gone(process.pid)
        seconds = time.monotonic() - asked
    finally:
        end_session(process)
    assert not left, f"still there: {left}\n{output}"
    assert set(SHARED_MEMORY.iterdir()) <= shared
    phases = re.findall(r"phase: (.*)", log.read_text())
    saves = [int(phase.split()[-1]) for phase in phases if phase.startswith("save")]
    others = [phase for phase in phases if not phase.startswith("save")]
    return Stopped(process.returncode, seconds, others[-1] if others else "", saves, output)


def calm_environment() -> dict[str, str]:
    """Return the environment of a command, with a Ray of its own."""
    return {**environment(), "RAY_ADDRESS": "local"}


def wait_for_line(process: subprocess.Popen, path: Path, line: str, timeout: float = 120) -> None:
    """Return as soon as the file ``path`` has a line that matches ``line``."""
    end = time.monotonic() + timeout
    while not (path.exists() and re.search(line, path.read_text(errors="replace"))):
        assert process.poll() is None, f"ended before {line!r}: {process.stdout.read()}"
        assert time.monotonic() < end, f"no {line!r} in {path}"
        time.sleep(0.002)


def wait_until_gone(session: int, timeout: float = 30.0) -> list[str]:
    """Return the processes of a session that are still there after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while alive_in(session) and time.monotonic() < end:
        time.sleep(0.1)
    return list(alive_in(session).values())


def end_session(process: subprocess.Popen) -> None:
    """Kill what is left of a session."""
    for pid in alive_in(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=10)
    process.stdout.close()


def alive_in(session: int) -> dict[int, str]:
    """Return pid and command of every process of a session; a dead one that nobody collected does not count."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found[int(folder.name)] = command
    return found


def with_word(word: str) -> Callable[[int], int]:
    """Return a function from a session to its process whose command has ``word``."""
    return lambda session: next(pid for pid, command in alive_in(session).items() if word in command)


def lines(folder: Path, name: str) -> list[dict]:
    """Return the lines of a file of a run without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "model_run" / name).read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second" and k.partition("/")[0] != "time"} for row in rows
    ]


def assert_same_run(folder: Path, whole: Path, *journals: str) -> None:
    """Fail unless the journals and the weights of two runs are equal bit for bit."""
    for name in journals:
        assert lines(folder, name) == lines(whole, name)
    assert_same_weights(folder / "model", whole / "model")
