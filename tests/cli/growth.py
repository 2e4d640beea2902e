"""What a running command holds: memory, files, threads, shared memory of each of its processes, and what it wrote."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

LOOKS = 9
"""How often a process is looked at in one place of the run; the median counts."""
DAEMON = "/ray/core/src/ray/"
SETTLES = 2 * 2**20
"""Bytes by which a daemon of Ray, of some 30 MiB, grows until its allocator has what it needs."""
SHARED = re.compile(r"/dev/shm/\S+")


@dataclass(frozen=True)
class Usage:
    """What one process holds: resident bytes, open files, threads, and files of /dev/shm that it maps."""

    name: str
    resident: int
    files: int
    threads: int
    shared: int


def watch(command: list[str], run_path: Path, at: tuple[int, int], timeout: float, **options: Any) -> list[dict]:
    """Run ``command`` and return what it holds at two steps: ``{pid: Usage}`` and, under 0, the bytes of its files.

    Fails when the command fails or a step does not come.
    """
    with (run_path.parent / "terminal.txt").open("w") as terminal:
        process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.STDOUT, **options)
        try:
            seen = [_look(process, run_path, step, time.monotonic() + timeout) for step in at]
            assert process.wait(timeout) == 0, Path(terminal.name).read_text()
        finally:
            process.kill()
            process.wait()
    return seen


def _look(process: subprocess.Popen, run_path: Path, step: int, deadline: float) -> dict[int, Any]:
    """Wait for ``step`` and look at every process of the run some times, a step apart."""
    looks: list[dict[int, Usage]] = []
    for later in range(LOOKS):
        while _steps(run_path) < step + later - LOOKS + 1:
            assert process.poll() is None and time.monotonic() < deadline, f"step {step} did not come"
            time.sleep(0.02)
        looks.append(_usages(process.pid))
    common = set.intersection(*(set(look) for look in looks))
    steady = {pid: _median([look[pid] for look in looks]) for pid in common}
    return {**steady, 0: sum(path.stat().st_size for path in run_path.rglob("*") if path.is_file())}


def _steps(run_path: Path) -> int:
    metrics = run_path / "metrics.jsonl"
    return metrics.read_bytes().count(b'"phase": "train"') if metrics.exists() else 0


def _usages(root: int) -> dict[int, Usage]:
    parent = psutil.Process(root)
    found = {}
    for process in (parent, *parent.children(recursive=True)):
        try:
            with process.oneshot():
                found[process.pid] = Usage(
                    " ".join(process.cmdline())[:100] or process.name(),
                    process.memory_info().rss,
                    process.num_fds(),
                    process.num_threads(),
                    len(set(SHARED.findall(Path(f"/proc/{process.pid}/maps").read_text()))),
                )
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
    return found


def _median(looks: list[Usage]) -> Usage:
    names = [name for name in Usage.__annotations__ if name != "name"]
    numbers = {name: int(median(getattr(look, name) for look in looks)) for name in names}
    return Usage(looks[0].name, **numbers)


def growth(before: dict[int, Any], after: dict[int, Any], most: float, steps: int, bytes_a_step: int) -> list[str]:
    """Return what grew: a process, or all, by more than the share ``most`` of its memory, anything else at all."""
    found = [f"process {after[pid].name} is new" for pid in after.keys() - before.keys()]
    for pid in before.keys() & after.keys() - {0}:
        early, late = before[pid], after[pid]
        allowed = max(early.resident * most, SETTLES if DAEMON in early.name else 0)
        if late.resident > early.resident + allowed:
            found.append(f"{late.name}: {early.resident} to {late.resident} bytes resident")
        for what in ("files", "threads", "shared"):
            if getattr(late, what) > getattr(early, what):
                found.append(f"{late.name}: {getattr(early, what)} to {getattr(late, what)} {what}")
    whole = [sum(usage.resident for pid, usage in look.items() if pid) for look in (before, after)]
    if whole[1] > whole[0] * (1 + most):
        found.append(f"all processes: {whole[0]} to {whole[1]} bytes resident")
    written = (after[0] - before[0]) / steps
    return found + ([f"{written:.0f} bytes written a step"] if written > bytes_a_step else [])


def table(before: dict[int, Any], after: dict[int, Any]) -> str:
    """Return the figures of two looks, a line a process."""
    lines = [
        f"{early.resident / 2**20:8.1f} -> {after[pid].resident / 2**20:8.1f} MiB "
        f"({(after[pid].resident / early.resident - 1) * 100:+.2f} %)  files {early.files} -> {after[pid].files}  "
        f"threads {early.threads} -> {after[pid].threads}  shm {early.shared} -> {after[pid].shared}  {early.name}"
        for pid, early in before.items()
        if pid and pid in after
    ]
    return "\n".join([*lines, f"run folder {before[0]} -> {after[0]} bytes"])
