"""Being asked to stop: SIGTERM and SIGINT, answered where a run can be left without a loss. Light to import: no torch.

After :func:`install` the first signal does one of three things, as the place where the program is says:

* elsewhere than below (start-up): it interrupts what runs, there is nothing to save yet;
* inside :func:`held`: it is remembered, and the loop asks with :func:`requested` or :func:`agreed` between its parts;
* inside :func:`droppable`: it is remembered, and whoever waits there asks with :func:`check` (or the ranks all at once
  with :func:`check_together`), which raises.

A second signal ends the process at once, even where it waits in a library; what is on the disk is whole at any moment.
Launchers and terminals signal a process twice for one request: a repetition within a second counts as the same.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from openrlhf.errors import Preempted

if TYPE_CHECKING:
    from openrlhf.strategy.comm import Comm

ASKED_BY = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_S = 1.0
DEAF_S = 10.0
"""How long the program may wait in a library, deaf to signals, before another thread answers for it.

A start-up is ended then. Later, in a reward function or while a checkpoint is read, a step would be lost with it.
"""
PATIENCE_S = 3600.0
"""How long, in seconds, ranks wait for one whose samples take longer than theirs."""
INNER_LAUNCHER, OUTER_LAUNCHERS = "deepspeed.launcher.launch", ("deepspeed", "deepspeed.launcher.runner")
ELSEWHERE = "a signal to another rank"
INTERRUPT, DROP, HOLD = "interrupt", "drop", "hold"


class _State:
    """What one process knows about being asked to stop."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.answered = False
        self.place = INTERRUPT
        self.may_lose = False
        self.installed = False


_state = _State()


def install() -> None:
    """Answer SIGTERM and SIGINT from now on; again after a library took the handlers. Main thread only."""
    for number in ASKED_BY:
        signal.signal(number, _on_signal)
    if _state.installed:
        return
    _state.installed = True
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    terminal = os.dup(2)
    threading.Thread(target=_listen, args=(reading, terminal), name="signals", daemon=True).start()
    launchers = _launchers()
    if launchers:
        threading.Thread(target=_follow, args=(launchers,), name="launcher", daemon=True).start()


def is_installed() -> bool:
    """Return whether a signal would reach this module."""
    return all(signal.getsignal(number) is _on_signal for number in ASKED_BY)


def requested() -> str | None:
    """Return by which signal this process was asked to stop, e.g. ``"SIGTERM"``, or None."""
    return _state.received


def ask(by: str) -> None:
    """Ask this process to stop, as a signal would that comes while it is remembered only."""
    _state.received = _state.received or by


def agreed(comm: Comm) -> str | None:
    """Return the name of the signal that any rank was asked to stop by; all ranks call it and hear the same."""
    if not comm.all_reduce(float(_state.received is not None), "max"):
        return None
    ask(ELSEWHERE)
    return _state.received


def check() -> None:
    """Raise :class:`Preempted` where this process was asked to stop and may drop what it waits for."""
    if _state.received and _state.place != HOLD:
        raise Preempted(f"stopped by {_state.received}")


def check_together(comm: Comm, after: str) -> None:
    """Wait for all ranks ``after`` something that they may drop; raise :class:`Preempted` if one was asked to stop."""
    if _state.place == HOLD:
        return
    comm.barrier(after, PATIENCE_S)
    if agreed(comm):
        raise Preempted(f"stopped by {_state.received}")


@contextmanager
def held() -> Iterator[None]:
    """Only remember signals inside; the block itself asks whether one came. The start-up ends with the first one."""
    if _state.installed and not is_installed():
        install()
    _state.may_lose = True
    with _at(HOLD):
        yield


@contextmanager
def droppable(comm: Comm | None = None) -> Iterator[None]:
    """Let :func:`check` raise inside: what is worked on is repeated, the same, by the run that goes on.

    All ranks of ``comm`` enter it, or none does.
    """
    with _at(DROP):
        check() if comm is None else check_together(comm, "one part of a step")
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal raise ``KeyboardInterrupt`` anywhere inside: for code that is not ours and never asks."""
    with _at(INTERRUPT):
        check()
        yield


@contextmanager
def _at(place: str) -> Iterator[None]:
    before, _state.place = _state.place, place
    try:
        yield
    finally:
        _state.place = before


def _on_signal(number: int, _: object) -> None:
    _state.answered = True
    if _state.received is not None:
        return
    _state.received = signal.Signals(number).name
    if _state.place == INTERRUPT:
        raise KeyboardInterrupt(_state.received)


def _listen(pipe: int, terminal: int) -> None:
    """Hear signals even while the main thread waits in a library, and end the process when it must."""
    first, told = None, False
    while True:
        heard, _, _ = select.select([pipe], [], [], 1.0)
        now = time.monotonic()
        if heard and any(number in ASKED_BY for number in os.read(pipe, 64)):
            if first is not None and now - first > SAME_REQUEST_S:
                _leave(terminal, "asked to stop once more: leaving at once; the last whole checkpoint stays as it is")
            first = first or now
        deaf = first is not None and not _state.answered and _state.place == INTERRUPT
        if deaf and now - first > DEAF_S and not told:
            told = True
            if not _state.may_lose:
                _leave(terminal, "stopped before the first step; nothing was trained")
            _say(terminal, "asked to stop: waiting for a call that does not return; ask once more to leave at once")


def _leave(terminal: int, why: str) -> NoReturn:
    _say(terminal, why)
    # A Ray that this process started would notice in its own time only.
    for process in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os._exit(Preempted.exit_code)


def _say(terminal: int, line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(terminal, f"{line}\n".encode())


def descendants(ancestor: int) -> list[int]:
    """Return the processes below ``ancestor``, the nearest first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        children.setdefault(_parent_of(int(folder.name)), []).append(int(folder.name))
    found = list(children.get(ancestor, []))
    for process in found:
        found += children.get(process, [])
    return found


def _forget() -> None:
    """Leave a forked child with the handlers of a fresh process."""
    signal.set_wakeup_fd(-1)
    for number in ASKED_BY:
        signal.signal(number, signal.SIG_DFL)


def _launchers() -> dict[int, int]:
    """Return the processes of DeepSpeed's launcher above this one, each with its parent.

    The outer of the two dies of a signal without telling the inner one, which would train on for nobody.
    """
    inner = os.getppid()
    if INNER_LAUNCHER not in _command_of(inner):
        return {}
    outer = _parent_of(inner)
    is_launcher = any(word.rsplit("/", 1)[-1] in OUTER_LAUNCHERS for word in _command_of(outer)[:4])
    return {os.getpid(): inner, **({inner: outer} if is_launcher else {})}


def _follow(parents: dict[int, int]) -> None:
    """Stop as if by SIGTERM when a process has another parent than in ``parents``: the launcher is gone."""
    while all(_parent_of(process) == parent for process, parent in parents.items()):
        time.sleep(0.5)
    if _state.received is None:
        os.kill(os.getpid(), signal.SIGTERM)


def _command_of(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0
