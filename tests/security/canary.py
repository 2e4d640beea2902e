"""A canary: something that writes a file when it is unpickled or run, so that a test sees whether it was."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any


class Canary:
    """Writes ``sang`` to a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return sing, (str(self.file),)


def sing(file: str) -> dict:
    """Write the file, and stand for a harmless dictionary."""
    Path(file).write_text("sang")
    return {}


def code(file: Path) -> str:
    """Return python code that writes the file when it is imported."""
    return f"open({str(file)!r}, 'w').write('sang')\n"


def pickled(file: Path) -> bytes:
    """Return the bytes of a plain pickle that writes the file."""
    return pickle.dumps(Canary(file))
