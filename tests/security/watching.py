"""Running a command under watch: on which addresses its processes listen, and which of them know a secret."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SECRET = "canary0123456789canary0123456789canary01"
LOOPBACK = ("127.", "::1", "::ffff:127.")


@dataclass
class Seen:
    """What was seen of a command and its descendants.

    Attributes:
        listening: (program, address) of every listening socket.
        told: programs other than the command itself with the secret in their command line or environment.
        programs: names of all of them.
    """

    listening: set[tuple[str, str]] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    programs: set[str] = field(default_factory=set)
    code: int = 0
    output: str = ""

    @property
    def open_ports(self) -> set[tuple[str, str]]:
        """Listening sockets that other machines reach."""
        return {(program, address) for program, address in self.listening if not address.startswith(LOOPBACK)}


def watch(words: list[str], environment: dict[str, str], cwd: Path, timeout: float = 300) -> Seen:
    """Run a command to its end and return what was seen of it."""
    seen, end = Seen(), time.monotonic() + timeout
    output = cwd / "output.txt"
    with output.open("w") as file:
        process = psutil.Popen(words, env=environment, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.monotonic() < end:
                look(process, seen)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
            seen.code = process.wait()
    seen.output = output.read_text()
    output.unlink()
    return seen


def look(process: psutil.Process, seen: Seen) -> None:
    """Add what the process and its descendants are doing now."""
    for one in [process, *process.children(recursive=True)]:
        try:
            name = program(one)
            seen.programs.add(name)
            sockets = [entry for entry in one.net_connections("tcp") if entry.status == psutil.CONN_LISTEN]
            seen.listening |= {(name, entry.laddr.ip) for entry in sockets}
            if one.pid != process.pid and SECRET in " ".join([*one.cmdline(), *one.environ().values()]):
                seen.told.add(name)
        except psutil.Error:
            continue  # it ended meanwhile


def program(process: psutil.Process) -> str:
    """Return a name for a process: of a python module or file rather than python."""
    words = [word for word in process.cmdline() if not word.startswith("-")]
    return Path(words[1] if len(words) > 1 and "python" in Path(words[0]).name else words[0]).name if words else "?"


def own_listeners() -> list[str]:
    """Return the addresses on which this process listens."""
    sockets = psutil.Process(os.getpid()).net_connections("tcp")
    return [entry.laddr.ip for entry in sockets if entry.status == psutil.CONN_LISTEN]


def files_with_secret(*folders: Path) -> list[str]:
    """Return the files under ``folders`` that hold the secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if SECRET.encode() in path.read_bytes()]
