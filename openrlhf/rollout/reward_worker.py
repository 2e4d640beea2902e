"""A reward function in a process of its own: the process. ``reward_process.py`` starts it and talks to it.

    python -m openrlhf.rollout.reward_worker FILE SECONDS READ_FROM WRITE_TO TRACE_TO      (three file descriptors)

It ends itself when a call takes longer than ``SECONDS``, even one that never returns to the interpreter (a regular
expression, a C extension), after it has written where the call was. It ends too when nobody can ask it any more.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy

from openrlhf.errors import DataError, NumericError
from openrlhf.rollout.reward_source import RewardFunction

OWN_CODE = str(Path(__file__).parent)


def main(path: str, seconds: str, read_from: str, write_to: str, trace_to: str) -> None:
    """Load the file, then answer requests until there are no more."""
    deadline_s, trace = float(seconds), int(trace_to)
    faulthandler.enable(trace)
    loaded: list[RewardFunction] = []

    def load() -> None:
        loaded.append(RewardFunction(path))

    with os.fdopen(int(read_from), "rb") as requests, os.fdopen(int(write_to), "wb") as answers:
        _answer(answers, load, deadline_s, trace)
        for line in requests if loaded else ():
            request = json.loads(line)
            _answer(answers, lambda request=request: _score(loaded[0], request), deadline_s, trace)


def _score(function: RewardFunction, request: dict[str, Any]) -> dict[str, Any]:
    _seed(request.pop("seed"))
    result = function.score(**request)
    return {"rewards": result.rewards, "extra_logs": result.extra}


def _answer(answers: Any, work: Callable[[], Any], deadline_s: float, trace: int) -> None:
    """Write what ``work`` returns, or the error that it raises, as a line of JSON."""
    try:
        with _ended_after(deadline_s, trace):
            answer = {"result": work()}
    except (DataError, NumericError) as error:
        cause = error.__cause__
        message = f"{error}{_places(cause)}" if cause else str(error)
        answer = {"error": type(error).__name__, "message": message}
    except SystemExit as error:
        answer = {"error": "DataError", "message": f"the reward function raised SystemExit: {error}{_places(error)}"}
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


@contextmanager
def _ended_after(seconds: float, trace: int) -> Iterator[None]:
    """End this process when the block takes longer, after writing to ``trace`` where it was."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=trace)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _places(error: BaseException) -> str:
    """Return the traceback of ``error`` without the frames of this package, on lines of their own."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OWN_CODE)]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    lines = "".join(traceback.format_list(frames)).rstrip()
    return f"\n{lines}" if lines else ""


def _seed(seed: int) -> None:
    """Seed the random generators that the function may use."""
    random.seed(seed)
    numpy.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


if __name__ == "__main__":
    main(*sys.argv[1:])
