"""A file of results that grows window by window, survives a kill at any moment, and is published when it is whole.

``<output>.partial`` holds one line that says what it is made of, then one line a window. A line that was cut short is
taken off by whoever goes on; ``<output>`` itself only ever appears by a rename. Light to import: no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from openrlhf.errors import InfraError, UsageError
from openrlhf.locks import NO_LOCKS, TAKEN
from openrlhf.strategy import files


class WindowFile:
    """The results of the windows done so far, of one process alone.

    Args:
        output: the file to publish.
        key: changes with everything that results depend on; another key's windows are moved aside.
        windows: the uids of the rows of every window.
        say: takes a line for the user.

    Raises:
        UsageError: another process is writing the same file.
        InfraError: the disk refuses.
    """

    def __init__(self, output: Path, key: str, windows: Sequence[Sequence[str]], say: Callable[[str], None]):
        self.output, self.path = output, output.with_name(f"{output.name}.partial")
        self._windows = windows
        self._results: list[list[Any]] = []
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._claimed()
            self._take_up(key, say)
        except OSError as error:
            raise self._refused(error) from error

    @property
    def done(self) -> int:
        """The number of windows that are in the file."""
        return len(self._results)

    @property
    def results(self) -> list[Any]:
        """The results of all rows so far, in their order."""
        return [result for window in self._results for result in window]

    def add(self, results: list[Any]) -> None:
        """Append the results of the next window, one a row, and wait until they are on the disk."""
        try:
            self._append({"uids": list(self._windows[self.done]), "results": results})
        except OSError as error:
            raise self._refused(error) from error
        self._results.append(results)

    def publish(self, rows: Iterable[dict]) -> None:
        """Write ``rows`` to the output in one go, and take the partial file away."""
        staging = self.output.with_name(f".{self.output.name}.whole")
        try:
            with staging.open("wb") as file:
                file.writelines(_line(row) for row in rows)
            files.fsync(staging)
            os.replace(staging, self.output)
            files.fsync(self.output.parent)
            self.path.unlink()
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()

    def _claimed(self) -> Any:
        """Return the partial file, open and locked for this process."""
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except TAKEN:
            file.close()
            raise UsageError(
                f"--output_path {self.output}: another process is writing this file; wait for it, or name another"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return file

    def _take_up(self, key: str, say: Callable[[str], None]) -> None:
        """Read the whole windows of an earlier process, and cut off what is behind them."""
        header = _line({"key": key})
        first = self._file.readline()
        if first.endswith(b"\n") and first != header:
            aside = self.path.with_name(f"{self.path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            self.path.rename(aside)
            self._file.close()
            self._file = self._claimed()
            say(f"starting afresh: what {self.path} held is of another model, data or flags, and now in {aside.name}")
        elif first == header:
            while self.done < len(self._windows) and self._read_window():
                pass
            rows = len(self.results)
            say(f"going on behind the {rows:,} row{'' if rows == 1 else 's'} that {self.path} holds")
            return
        self._file.seek(0)
        self._file.truncate()
        self._append({"key": key})

    def _read_window(self) -> bool:
        """Take the next window from the file; cut the file there and return false when it is not whole."""
        start = self._file.tell()
        line = self._file.readline()
        window = _window_of(line)
        if window.get("uids") == list(self._windows[self.done]):
            self._results.append(window["results"])
            return True
        self._file.seek(start)
        self._file.truncate()
        return False

    def _append(self, content: Any) -> None:
        self._file.write(_line(content))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _refused(self, error: OSError) -> InfraError:
        return InfraError(
            f"--output_path {self.output}: cannot be written ({error}); once it can be, the same command goes on "
            f"behind what is in {self.path.name}"
        )


def _line(content: Any) -> bytes:
    """Return a line of JSON; letters stay letters but for halves of a pair, which UTF-8 does not have."""
    try:
        return f"{json.dumps(content, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(content)}\n".encode()


def _window_of(line: bytes) -> dict[str, Any]:
    """Return what a line holds; nothing where it was cut short, or a disk that lost its power left other bytes."""
    try:
        window = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return {}
    return window if isinstance(window, dict) else {}
