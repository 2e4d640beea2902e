"""Tokenised rows are kept in the run folder, so that they are made once: not by every rank, and not again on resume.

A kept file is used only for the same rows, tokenizer, template, settings and code; any other is made anew. All of
these count by their content: data, model or code that is renamed or moved is still the same, and what replaces it
under its old name is not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openrlhf.datasets.store import RowStore, RowWriter, open_rows
from openrlhf.errors import InfraError
from openrlhf.locks import NO_LOCKS, TAKEN, holder, sign, signature

LOG = logging.getLogger(__name__)
LOOKS = 0.1
"""Seconds between two looks at a lock that another rank holds."""
SILENT_S = 10.0
"""Seconds of waiting before it is said for whom."""
SHELF = 5000
"""Rows that are hashed at a time."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")


def cache_key(rows: Any, tokenizer: Any, *settings: Any) -> str | None:
    """Return a hash of all that tokenised rows depend on; None where that cannot be known.

    Args:
        rows: a ``datasets.Dataset``; its content counts, not its name. Of a list nothing is kept.
        tokenizer: a fast one; a slow one does not show what it is made of.
        settings: what else the rows depend on, with a ``repr`` that says it.
    """
    if not hasattr(rows, "with_format") or not getattr(tokenizer, "is_fast", False):
        return None
    digest = hashlib.sha256()
    for part in (_code(), _tokenizer_text(tokenizer), repr(settings)):
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    tables = rows.with_format("arrow")
    digest.update(repr([(name, str(kind)) for name, kind in rows.features.items()]).encode())
    for start in range(0, len(rows), SHELF):
        for batch in tables[start : start + SHELF].combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def kept_rows(
    path: Path, key: str, parts: int, make: Callable[[RowWriter], dict[str, Any]]
) -> tuple[RowStore, dict[str, Any]]:
    """Return ``(rows, facts)`` from ``path``; where they are not there, whole and of this key, ``make`` them.

    ``make(writer)`` adds the rows and returns the facts to keep with them. Ranks that come meanwhile wait for it.

    Raises:
        InfraError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path):
            found = _open(path, key, parts)
            if found is None:
                _write(path, key, parts, make)
                found = _open(path, key, parts)
    except OSError as error:
        raise InfraError(f"cannot keep the tokenised rows in {path.parent} (--run_path): {error}") from error
    if found is None:
        raise InfraError(f"{path}: what was written is not what is there; is the disk of --run_path in order?")
    return found


def _open(path: Path, key: str, parts: int) -> tuple[RowStore, dict[str, Any]] | None:
    found = open_rows(path, parts)
    if found is None or found[1].get("key") != key:
        return None
    return found[0], found[1]["made"]


def _write(path: Path, key: str, parts: int, make: Callable[[RowWriter], dict[str, Any]]) -> None:
    for left_over in path.parent.glob(f"{path.name}.*.tmp"):
        left_over.unlink(missing_ok=True)
    staging = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with staging.open("wb") as file:
            writer = RowWriter(parts, file)
            writer.seal({"key": key, "made": make(writer)})
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process works on ``path``. The lock ends with its process; a disk may have none."""
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _locked(descriptor, path):
            sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, path: Path) -> bool:
    """Wait for the lock and return whether there is one; say once for whom it is that this takes long."""
    silent_until = time.monotonic() + SILENT_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except TAKEN:
            if time.monotonic() > silent_until:
                LOG.info("waiting for %s, which makes the tokenised rows %s", holder(signature(descriptor)), path)
                silent_until = math.inf
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        time.sleep(LOOKS)


def _tokenizer_text(tokenizer: Any) -> str:
    """Return all that a fast tokenizer and its chat template are made of."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = [type(tokenizer).__name__, tokenizer.chat_template, special]
    return json.dumps(settings, default=str) + tokenizer.backend_tokenizer.to_str()


@cache
def _code() -> str:
    """Return a hash of the code that makes rows, and the versions of the libraries under it."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest() + "".join(f" {name} {version(name)}" for name in LIBRARIES)
