"""A reward function in a process of its own: what the driver sees of it.

User code may loop for ever, exit, or crash the interpreter; here that is one error that shows where the function was,
and the driver goes on to end the run in order. The other side is ``reward_worker.py``. Between the two travels JSON
only, a line each way.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from openrlhf.config.secrets import is_secret
from openrlhf.errors import DataError, NumericError
from openrlhf.rollout.reward_result import RewardResult, names_of, result_from_json
from openrlhf.rollout.reward_source import FUNCTION

ERRORS = {"DataError": DataError, "NumericError": NumericError}
LATER_S = 5.0
"""How much later than the function's process, which ends itself at the deadline, the driver gives up on it."""
CLOSING_S = 2.0
OWN_FRAME = f'File "{Path(__file__).parent}{os.sep}'
"""How a line of a traceback begins that shows our own code."""


class RewardProcess:
    """The ``reward_func`` of a python file, in a process that lives as long as this object. Not for several threads.

    The process is started at once, so that a file that cannot be used is an error before any model is loaded. Each
    call hands it a seed drawn from ``random``: a function that draws random numbers draws the same ones again in a
    run that goes on from a checkpoint.

    Args:
        path: the python file.
        timeout_s: how long a call may take, and the loading of the file.
        secrets: environment variables that the function gets although their names say that they are secret.

    Raises:
        DataError: the file cannot be used.
    """

    def __init__(self, path: str | Path, timeout_s: float = 600.0, secrets: Sequence[str] = ()):
        self.path = Path(path).expanduser().absolute()
        self._timeout_s = timeout_s
        self._secrets = secrets
        self._worker: _Worker | None = None
        self._start()

    def score(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[str] | None = None,
        uids: Sequence[str] | None = None,
    ) -> RewardResult:
        """Return the rewards as :meth:`~openrlhf.rollout.reward_result.RewardSource.score` describes.

        Raises:
            DataError: also: the call took too long, or ended its process.
        """
        names = names_of(len(queries), uids)
        request = {
            "queries": list(queries),
            "prompts": list(prompts),
            "labels": [""] * len(queries) if labels is None else list(labels),
            "uids": None if uids is None else list(uids),
            "seed": random.getrandbits(32),
        }
        worker = self._worker if self._worker and self._worker.is_alive else self._start()
        return result_from_json(self._ask(worker, request), names, f"{self.path}: {FUNCTION}")

    def close(self) -> None:
        """End the process."""
        if self._worker:
            self._worker.close()
            self._worker = None

    def _start(self) -> _Worker:
        self.close()
        self._worker = _Worker(self.path, self._timeout_s, self._secrets)
        self._ask(self._worker, None)
        return self._worker

    def _ask(self, worker: _Worker, request: dict[str, Any] | None) -> Any:
        """Return the answer to ``request``, or with None that the file is loaded; a process that fails is ended."""
        try:
            answer = worker.exchange(request)
        except BaseException:
            worker.kill()
            self.close()
            raise
        if "error" in answer:
            raise ERRORS[answer["error"]](answer["message"])
        return answer["result"]


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, path: Path, timeout_s: float, secrets: Sequence[str]):
        self._path, self._timeout_s = path, timeout_s
        self._places = tempfile.TemporaryFile()  # noqa: SIM115
        child_in, self._to = os.pipe()
        self._from, child_out = os.pipe()
        os.set_blocking(self._to, False)
        ends = (child_in, child_out, self._places.fileno())
        words = [sys.executable, "-m", "openrlhf.rollout.reward_worker", str(path), str(timeout_s), *map(str, ends)]
        try:
            self._process = subprocess.Popen(  # noqa: S603
                words, stdin=subprocess.DEVNULL, pass_fds=ends, env=_environment(secrets), start_new_session=True
            )
        finally:
            os.close(child_in)
            os.close(child_out)
        pipes = (self._to, self._from)
        self.close = weakref.finalize(self, _end, self._process, pipes, self._places)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """Send a request, or nothing, and return the answer.

        Raises:
            DataError: there is none: the deadline passed, or the process ended.
        """
        deadline = time.monotonic() + self._timeout_s + LATER_S
        with suppress(BrokenPipeError):
            self._send(b"" if request is None else json.dumps(request).encode() + b"\n", deadline)
        line = self._receive(deadline)
        if not line.endswith(b"\n"):
            raise DataError(self._why_silent("load" if request is None else "answer"))
        return json.loads(line)

    def _send(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left and _ready(self._to, select.POLLOUT, deadline):
            left = left[os.write(self._to, left) :]

    def _receive(self, deadline: float) -> bytes:
        """Return what comes up to the end of a line, the end of the process, or the deadline."""
        line = bytearray()
        while not line.endswith(b"\n"):
            if not _ready(self._from, select.POLLIN, deadline):
                break
            piece = os.read(self._from, 2**20)
            if not piece:
                break
            line += piece
        return bytes(line)

    def kill(self) -> None:
        """End the process now, with all that it started."""
        _kill(self._process)

    def _why_silent(self, what: str) -> str:
        """Return why there is no answer, with the place in the function where it stopped."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LATER_S)
        code = self._process.poll()
        self._places.seek(0)
        places = self._places.read(2**14).decode("utf-8", "replace")
        where = "".join(f"\n{line}" for line in places.splitlines() if line and OWN_FRAME not in line)
        if places.startswith("Timeout") or code is None:
            return (
                f"{self._path}: {FUNCTION} did not {what} within {self._timeout_s:g} s and was ended; "
                f"--reward_func_timeout gives it longer{where}"
            )
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{self._path}: {FUNCTION} ended its process ({how}){where}"


def _ready(pipe: int, event: int, deadline: float) -> bool:
    """Wait until there is something to read, room to write, or nobody at the other end; false at the deadline."""
    waiting = select.poll()
    waiting.register(pipe, event)
    return bool(waiting.poll(1000 * max(0.0, deadline - time.monotonic())))


def _environment(secrets: Sequence[str]) -> dict[str, str]:
    """Return an environment in which the process finds what this one imports, and of its keys only ``secrets``."""
    folders = [str(Path(__file__).resolve().parents[2]), *(folder or os.getcwd() for folder in sys.path)]
    shared = {name: value for name, value in os.environ.items() if name in secrets or not is_secret(name)}
    return {**shared, "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen, pipes: Sequence[int], places: Any) -> None:
    """Let the process end, which an idle one does when nobody can ask it any more, and end what it started."""
    for pipe in pipes:
        os.close(pipe)
    places.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(CLOSING_S)
    _kill(process)
    process.wait()
