"""The lock of a folder that one run alone may write to. Light to import: no torch.

The lock is the kernel's: it ends with the process that holds it, however that ends. The file says who it is.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from openrlhf.errors import UsageError
from openrlhf.locks import NO_LOCKS, TAKEN, holder, sign, signature

LOCK = ".openrlhf.lock"


class FolderLock:
    """Keeps other runs out of a folder until `release`, or until this process is gone.

    ``flags`` names the flags that choose the folder, for the message.
    """

    def __init__(self, folder: Path, flags: str):
        self.path = folder / LOCK
        self._flags = flags
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Take the lock; return a line to print when an earlier holder is gone without having released it.

        Raises ``UsageError`` that names process, machine and time of a live holder, ``OSError`` when the disk refuses.
        """
        try:
            descriptor = _lock(self.path)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return f"the disk of {self.path.parent} has no locks: another run in it would not be noticed"
        if descriptor is None:
            raise UsageError(
                f"{self.path.parent} is in use by {holder(self.path.read_bytes())}: wait for it, or give this run "
                f"another folder ({self._flags})"
            )
        before = signature(descriptor)
        sign(descriptor)
        self._descriptor = descriptor
        return f"took over {self.path.parent} from {holder(before)}, which is gone" if before else None

    def release(self) -> None:
        """Let go, and take the file away; does nothing without the lock."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock of ``path``; None while another process does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A POSIX lock: children do not inherit it, and network disks know it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have taken the file away in between: then this is a lock on nothing.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except TAKEN:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
