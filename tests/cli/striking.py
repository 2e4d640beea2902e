"""A run of PPO on Ray that is struck: signals to its processes while the driver is known to be in a certain phase."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from tests.cli.stopping import SHARED_MEMORY, calm_environment, end_session, wait_until_gone
from tests.cli.supervised import ROOT

DRIVER = "driver"
PATIENCE_S = 280.0
"""How long anything may take; the machine may be busy with others, so it says nothing about the run."""


class Target:
    """A run that was started.

    Attributes:
        step: the last step after which it was struck.
        output: what it wrote to the terminal, once it has ended.
    """

    def __init__(self, words: list[str], run_path: Path):
        self.step, self.output = 0, ""
        self._log = run_path / "log.txt"
        self._log.unlink(missing_ok=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._process = subprocess.Popen(words, env=calm_environment(), cwd=ROOT, start_new_session=True, **pipes)

    @property
    def log(self) -> str:
        """Its log so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def strike(self, moment: str, whom: str, number: signal.Signals, since: int) -> int:
        """Send ``number`` to ``whom`` (``DRIVER``, or a name in the log) in phase ``moment`` after step ``since``.

        Return the process that got it. The driver stands still meanwhile, so it is in that phase.
        """

        def in_it() -> bool:
            phases = re.findall(r"phase: (.*)", self.log)
            found = re.fullmatch(rf"{moment}, after step (\d+)", phases[-1]) if phases else None
            self.step = int(found[1]) if found else self.step
            return found is not None and self.step >= since

        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self._process.poll() is None:
            if in_it():
                with self._standing_still():
                    if in_it():
                        pid = self._pid_of(whom)
                        os.kill(pid, number)
                        return pid
            time.sleep(0.002)
        raise AssertionError(f"not met in {moment} after step {since}:\n{self._rest()}")

    def seconds_until(self, line: str, times: int) -> float:
        """Return how long it takes from now until the log has ``line`` so many times."""
        began = time.monotonic()
        while len(re.findall(line, self.log)) < times:
            ended, passed = self._process.poll() is not None, time.monotonic() - began
            assert passed < PATIENCE_S and not ended, f"no {line!r}:\n{self._rest()}"
            time.sleep(0.05)
        return round(time.monotonic() - began, 1)

    def end(self) -> tuple[int, float]:
        """Wait until the run has ended; return its exit status and how long that took."""
        began = time.monotonic()
        self.output, _ = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, round(time.monotonic() - began, 1)

    def check_nothing_left(self) -> None:
        """Fail when a process of the run outlives it."""
        left = wait_until_gone(self._process.pid)
        assert not left, f"still there: {left}"

    def close(self) -> None:
        """Kill what is left."""
        end_session(self._process)

    def _pid_of(self, whom: str) -> int:
        return self._process.pid if whom == DRIVER else int(re.findall(rf"{whom} is process (\d+)", self.log)[-1])

    def _rest(self) -> str:
        return f"{self.log[-2000:]}\n{self._process.stdout.read() if self._process.poll() is not None else ''}"

    @contextmanager
    def _standing_still(self):
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)


@contextmanager
def target(words: list[str], run_path: Path):
    """Run a command to be struck; nothing of it is left afterwards, nor of its shared memory."""
    shared = set(SHARED_MEMORY.iterdir())
    run = Target(words, run_path)
    try:
        yield run
        run.check_nothing_left()
    finally:
        run.close()
    assert set(SHARED_MEMORY.iterdir()) <= shared
