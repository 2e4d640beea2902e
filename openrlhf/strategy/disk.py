"""Work on a folder that all ranks share: rank 0 does it, all ranks hear what it gave or why it failed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from openrlhf.errors import InfraError, OpenRLHFError
from openrlhf.strategy import files
from openrlhf.strategy.comm import Comm

DISK_S = 3600.0
"""How long, in seconds, ranks wait for the work of others on a disk, which may take longer than any collective."""
GIB = 2**30
MIB = 2**20


class SharedDisk:
    """The folder ``root`` as the ranks of ``comm`` work on it together; all ranks call every method."""

    def __init__(self, root: Path, comm: Comm):
        self.root, self.comm = root, comm

    def wait(self, what: str) -> None:
        """Wait until all ranks have done their part of ``what``."""
        self.comm.barrier(what, DISK_S)

    def on_main(self, action: Callable[[], Any], what: str, partial: Path | None = None) -> Any:
        """Run ``action`` on rank 0 and return its result on all ranks.

        ``what`` completes "cannot ... <root>"; ``partial`` is removed when it fails. All ranks raise ``InfraError`` if
        the disk refuses (torch says so with a ``RuntimeError``), or the error of ours that ``action`` raised.
        """
        value, failure = None, None
        if self.comm.rank == 0:
            try:
                value = action()
            except OpenRLHFError as error:
                failure = error
            except (OSError, RuntimeError) as error:
                failure = files.why(error)
        self.wait(f"{what} {self.root}")
        value, failure = self.comm.broadcast_object((value, failure))
        if failure is not None:
            self._give_up(failure, what, partial)
        return value

    def agree(self, problem: str | None, what: str, partial: Path) -> None:
        """Raise ``InfraError`` on all ranks when one has a ``problem``; ``partial`` is removed then."""
        self.wait(f"{what} {self.root}")
        found = [each for each in self.comm.all_gather_object(problem) if each]
        if found:
            self._give_up("; ".join(found), what, partial)

    def _give_up(self, failure: str | OpenRLHFError, what: str, partial: Path | None) -> NoReturn:
        if partial is not None and self.comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(failure, OpenRLHFError):
            raise failure
        raise InfraError(f"cannot {what} {self.root}: {failure}{_free_space(self.root)}")


def free_bytes(root: Path) -> int:
    """Return the free bytes of the disk that ``root`` is on, or will be."""
    return shutil.disk_usage(files.nearest_folder(root)).free


def in_words(size: float) -> str:
    """Return bytes as ``"1.5 GiB"`` or ``"20.0 MiB"``."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _free_space(root: Path) -> str:
    try:
        return f" ({in_words(free_bytes(root))} free)"
    except OSError:
        return ""
