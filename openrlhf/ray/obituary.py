"""What can be said of a process that is gone: its number, the signal that ended it, its memory, its log."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import ray

from openrlhf.ray.host import Sign

VANISHED = "connection error code 2"
"""How Ray says that a process ended without a word."""
LAST_WORDS = re.compile(r"\*\*\* (SIG[A-Z]+) received")
"""What Ray's workers write when a signal ends them, unless it is SIGKILL."""

END_BYTES = 2**16


def how_it_died(error: BaseException, sign: Sign | None) -> str:
    """Return one sentence on the process of a dead actor.

    Args:
        error: what Ray said of it.
        sign: its last sign of life.
    """
    text = str(error)
    process = _field(text, "pid") or (str(sign.pid) if sign else "")
    node = _field(text, "ip")
    log = _log_of(process)
    where = f"its log: {log}" if log else f"its log is in Ray's folder of the machine {node}" if node else "no log"
    memory = f"; it held {sign.memory / 2**30:.2f} GiB when last seen" if sign else ""
    who = f"Process {process or 'unknown'}"
    return f"{who} {_cause(text, log)}{memory}; {where}"


def _cause(text: str, log: Path | None) -> str:
    """Return what ended a process, as far as Ray and its log tell."""
    if VANISHED not in text:
        return f"ended: {one_line(text)}"
    if log is None:
        return "was killed, or crashed"
    said = LAST_WORDS.search(_end_of(log))
    return f"was ended by {said[1]}" if said else "was ended by SIGKILL, as the system does when memory runs out"


def _end_of(path: Path) -> str:
    """Return the last of a log, however long it is."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - END_BYTES))
        return file.read().decode(errors="replace")
    return ""


def _field(text: str, name: str) -> str:
    """Return an entry of the table in Ray's message."""
    found = re.search(rf"^\s*{name}: (\S+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _log_of(process: str) -> Path | None:
    """Return where Ray keeps the standard error of a process of this machine."""
    node = ray._private.worker._global_node
    if not process or node is None:
        return None
    return next(Path(node.get_logs_dir_path()).glob(f"worker-*-{process}.err"), None)


def one_line(error: BaseException | str) -> str:
    """Return Ray's message without its tables and line breaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return " ".join(lines)[:600]
