"""A file of results that grows window by window, survives a kill at any moment, and is published when it is whole.

``<output>.partial`` holds one line that says what it is made of, then one line a window, of any number of rows. A line
that was cut short is taken off by whoever goes on; ``<output>`` itself only ever appears by a rename. Light to import:
no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        speed: flags that results depend on by rounding only; windows of others are kept, and the user hears of it.
        uids: one a row.
        say: takes a line for the user.

    Attributes:
        results: of all rows so far, in their order.

    Raises:
        UsageError: another process is writing the same file.
        InfraError: the disk refuses.
    """

    def __init__(
        self, output: Path, key: str, speed: Mapping[str, Any], uids: Sequence[str], say: Callable[[str], None]
    ):
        self.output, self.path = output, output.with_name(f"{output.name}.partial")
        self.results: list[Any] = []
        self._uids, self._say = uids, say
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._claimed()
            self._take_up({"key": key, "speed": dict(speed)})
        except OSError as error:
            raise self._refused(error) from error

    @property
    def done(self) -> int:
        """The number of rows whose results are in the file."""
        return len(self.results)

    def add(self, results: list[Any]) -> None:
        """Append the results of the next rows, one a row, and wait until they are on the disk."""
        uids = self._uids[self.done : self.done + len(results)]
        try:
            self._append({"uids": list(uids), "results": results})
        except OSError as error:
            raise self._refused(error) from error
        self.results += results

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

    def _take_up(self, header: dict[str, Any]) -> None:
        """Read the whole windows of an earlier process, and cut off what is behind them."""
        first = self._file.readline()
        found = _content_of(first)
        if first.endswith(b"\n") and found.get("key") != header["key"]:
            self._move_aside()
        elif found:
            while self._read_window():
                pass
            self._say(f"going on behind the {self.done:,} row{'' if self.done == 1 else 's'} that {self.path} holds")
            self._say_changed(found.get("speed") or {}, header["speed"])
            return
        self._file.seek(0)
        self._file.truncate()
        self._append(header)

    def _move_aside(self) -> None:
        """Keep the file of another key under another name and begin a new one."""
        aside = self.path.with_name(f"{self.path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.path.rename(aside)
        self._file.close()
        self._file = self._claimed()
        self._say(
            f"starting afresh: what {self.path} held is of another model, data or flags, and now in {aside.name}"
        )

    def _say_changed(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Tell of flags that were others when the file was begun."""
        changed = [f"--{name} {before[name]}" for name in now if name in before and before[name] != now[name]]
        if changed and self.done:
            self._say(f"these were made with {', '.join(changed)}: what comes now may differ by rounding, no more")

    def _read_window(self) -> bool:
        """Take the next window from the file; cut the file there and return false when it is not whole."""
        start = self._file.tell()
        window = _content_of(self._file.readline())
        uids, results = window.get("uids"), window.get("results")
        whole = isinstance(uids, list) and isinstance(results, list) and 0 < len(uids) == len(results)
        if whole and uids == list(self._uids[self.done : self.done + len(uids)]):
            self.results += results
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


def _content_of(line: bytes) -> dict[str, Any]:
    """Return what a line holds; nothing where it was cut short, or a disk that lost its power left other bytes."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
