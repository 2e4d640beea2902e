"""Locks of the kernel on files: what a refusal looks like, and who holds one. Light to import: no torch.

Such a lock ends with the process that holds it, however that ends. The locked file says who it is.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time

TAKEN = (BlockingIOError, PermissionError)
"""What taking a lock raises while another process has it."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""The numbers of the errors of a disk that has no locks."""
MOST_BYTES = 4096


def sign(descriptor: int) -> None:
    """Write into the locked file that this process holds it. Raises ``OSError`` when the disk refuses."""
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(me).encode(), 0)


def signature(descriptor: int) -> bytes:
    """Return what the last holder wrote.

    It takes an open descriptor, because a process that opens and closes a file gives back its own lock on it.
    """
    return os.pread(descriptor, MOST_BYTES, 0)


def holder(text: bytes) -> str:
    """Return who wrote ``text`` into a lock file, in words."""
    try:
        who = json.loads(text)
        return f"process {who['pid']} on {who['host']} (since {who['since']})"
    except (ValueError, LookupError, TypeError):
        return "another process"
