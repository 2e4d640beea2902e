"""The terminal of a run: our lines on it, everything that libraries write in the log. Light to import: no torch."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

OURS = logging.getLogger("openrlhf")
SECONDS_BETWEEN_LINES = 15.0
"""How often progress is written where it cannot be one line that updates itself."""
WIDTH = 120
"""The columns of a terminal that does not tell."""


class Console:
    """The terminal of a run: lines that stay, and one status line that updates itself. Only rank 0 speaks."""

    def __init__(self, stream: TextIO, quiet: bool = False):
        self._stream, self._quiet = stream, quiet
        self._live = stream.isatty()
        self._status, self._last = "", float("-inf")

    def line(self, text: str) -> None:
        """Write a line that stays."""
        if self._quiet:
            return
        erase = "\r\x1b[2K" if self._status else ""
        self._write(f"{erase}{text}\n{self._status}")

    def status(self, text: str, at_once: bool = False) -> None:
        """Show where the run stands; off a terminal a line each few seconds, or ``at_once``."""
        if self._quiet:
            return
        if self._live:
            self._status = text[: self._columns() - 1]
            self._write(f"\r\x1b[2K{self._status}")
        elif at_once or time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.line(text)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or WIDTH
        except OSError:
            return WIDTH

    def settle(self) -> None:
        """Leave the status line as it is and go on below it."""
        if self._status:
            self._status = ""
            self._write("\n")

    def _write(self, text: str) -> None:
        """Write, unless the terminal is gone or its disk is full: nobody reads then, and training goes on."""
        with suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


@contextmanager
def noise_to(log_file: Path) -> Iterator[TextIO]:
    """Point file descriptors 1 and 2 at ``log_file`` (appended) and yield the terminal that was stdout.

    What the disk does not take is lost, and nobody who prints hears of it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    target = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    try:
        terminal = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8")
        with terminal, redirect_stdout(_noise(1)), redirect_stderr(_noise(2)):
            yield terminal
    except BaseException:
        with suppress(OSError):
            os.write(2, traceback.format_exc().encode())
        raise
    finally:
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)


class _Noise(io.FileIO):
    """A file that swallows what the disk refuses."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _noise(descriptor: int) -> TextIO:
    """Return a stream that writes to ``descriptor`` at once and leaves it open."""
    raw = _Noise(descriptor, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.line(record.getMessage())


@contextmanager
def our_lines(console: Console) -> Iterator[Console]:
    """Send the ``openrlhf`` loggers to the console and the log for as long as the block lasts."""
    to_log = logging.StreamHandler(_noise(2))
    to_log.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    handlers = [_ConsoleHandler(console), to_log]
    before = OURS.level, OURS.propagate
    OURS.setLevel(logging.DEBUG)
    OURS.propagate = False
    for handler in handlers:
        OURS.addHandler(handler)
    try:
        yield console
    finally:
        console.settle()
        for handler in handlers:
            OURS.removeHandler(handler)
        to_log.flush()
        OURS.level, OURS.propagate = before[0], before[1]
