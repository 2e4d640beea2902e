"""Work on a folder that all ranks share: rank 0 does it, all ranks hear what it gave or why it failed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openrlhf.errors import InfraError
from openrlhf.strategy import files
from openrlhf.strategy.comm import Comm

GIB = 2**30
MIB = 2**20


class SharedDisk:
    """The folder ``root`` as the ranks of ``comm`` work on it together; all ranks call every method.

    ``wait_s`` is how long, in seconds, ranks wait for each other's work, which may take longer than any collective.
    """

    def __init__(self, root: Path, comm: Comm, wait_s: float):
        self.root, self.comm, self.wait_s = root, comm, wait_s

    def on_main(self, action: Callable[[], Any], what: str, partial: Path | None = None) -> Any:
        """Run ``action`` on rank 0 and return its result on all ranks; all raise ``InfraError`` if the disk refuses.

        ``what`` completes "cannot ... <root>"; ``partial`` is removed when it fails.
        """
        value, problem = None, None
        if self.comm.rank == 0:
            try:
                value = action()
            except OSError as error:
                problem = str(error)
        self.comm.barrier(f"{what} {self.root}", self.wait_s)
        value, problem = self.comm.broadcast_object((value, problem))
        if problem:
            self._give_up([problem], what, partial)
        return value

    def agree(self, problem: str | None, what: str, partial: Path) -> None:
        """Raise ``InfraError`` on all ranks when one has a ``problem``; ``partial`` is removed then."""
        self.comm.barrier(f"{what} {self.root}", self.wait_s)
        found = [each for each in self.comm.all_gather_object(problem) if each]
        if found:
            self._give_up(found, what, partial)

    def _give_up(self, problems: list[str], what: str, partial: Path | None) -> None:
        if partial is not None and self.comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise InfraError(f"cannot {what} {self.root}: {'; '.join(problems)}{_free_space(self.root)}")


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
