"""The lock of a folder that one run alone may write to. Light to import: no torch.

The lock is the kernel's: it ends with the process that holds it, however that ends. The file says who it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from openrlhf.errors import UsageError

LOCK = ".openrlhf.lock"
MOST_BYTES = 4096
REFUSED = (BlockingIOError, PermissionError)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


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
                f"{self.path.parent} is in use by {_holder(self.path.read_bytes())}: wait for it, or give this run "
                f"another folder ({self._flags})"
            )
        # Opening the file a second time and closing it would give the lock back.
        before = os.pread(descriptor, MOST_BYTES, 0)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        self._descriptor = descriptor
        return f"took over {self.path.parent} from {_holder(before)}, which is gone" if before else None

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
        except REFUSED:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(text: bytes) -> str:
    """Return who wrote ``text`` into a lock file, in words."""
    try:
        who = json.loads(text)
        return f"process {who['pid']} on {who['host']} (since {who['since']})"
    except (ValueError, LookupError, TypeError):
        return "another process"
