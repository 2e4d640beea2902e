"""A small process that ends what a Ray of this machine leaves behind when the program that started it is gone.

Ray's own processes notice that by themselves, but two of them take a minute over it. The guard, run as a script so
that it imports nothing of ours, waits until its standard input closes, which happens however the program ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

GRACE_S = 2.0
"""How long processes have to end by themselves."""
START_TIME = 19
"""The place of a process's start time in ``/proc/<pid>/stat``, counted after its name."""

_guards: list[subprocess.Popen] = []


def watch_over(processes: Iterable[int]) -> None:
    """Have a guard kill ``processes`` soon after this program is gone; does nothing where there is no ``/proc``."""
    known = [f"{process}/{started}" for process in processes if (started := start_time(process))]
    if known:
        # Nobody but this program holds the other end of its input, and nobody waits for the guard.
        command = [sys.executable, "-I", "-S", __file__, *known]
        _guards.append(subprocess.Popen(command, stdin=subprocess.PIPE))  # noqa: S603


def start_time(process: int) -> str:
    """Return when ``process`` was started, which tells it from a later one of the same number; ``""`` if it ended."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[START_TIME]


def main(known: list[str]) -> None:
    """Wait for the end of the program, then for that of the processes ``pid/start time``, and kill what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    deadline = time.monotonic() + GRACE_S
    left = [each.split("/") for each in known]
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [(process, started) for process, started in left if start_time(int(process)) == started]
    for process, _ in left:
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
