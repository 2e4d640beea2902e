"""Rows of whole numbers in one flat array: in memory, or in a file that is mapped and not read.

A row has a fixed number of parts of any length. A file is ``values int32 | ends int64 | JSON | footer``; the footer
seals the rest, so that a file which was cut or changed, or is something else, is noticed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

MAGIC = b"OrlhfR01"
FOOTER = struct.Struct("<q32s8s")
FLUSHED = 1 << 20
"""Values that are held back before they go to the file."""
BLOCK = 1 << 22


class RowStore:
    """Rows of ``P`` parts each.

    Attributes:
        digest: 32 hexadecimal digits that change with any value, and with the order and the number of rows.
    """

    def __init__(self, values: np.ndarray, ends: np.ndarray, digest: str):
        """``values`` int32, and ``ends`` ``(rows, P)`` int64: where each part of each row ends in them."""
        self._values, self._ends, self.digest = values, ends, digest

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[np.ndarray]:
        """Return the ``P`` parts of a row."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1, -1]) if index else 0
        ends = self._ends[index].tolist()
        return [self._values[first:last] for first, last in zip([start, *ends[:-1]], ends, strict=True)]

    def lengths(self, part: int) -> np.ndarray:
        """Return the length of one part of every row."""
        return np.diff(self._ends.ravel(), prepend=0)[part :: self._ends.shape[1]]


class RowWriter:
    """Takes rows one by one, into memory or into a file."""

    def __init__(self, parts: int, file: IO[bytes] | None = None):
        self._parts, self._file = parts, file
        self._values, self._ends = array("i"), array("q")
        self._count = 0
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._ends) // self._parts

    def add(self, *parts: Sequence[int]) -> None:
        """Add one row."""
        for part in parts:
            self._values.extend(part)
            self._count += len(part)
            self._ends.append(self._count)
        if self._file and len(self._values) > FLUSHED:
            self._write(self._values)
            del self._values[:]

    def store(self) -> RowStore:
        """Return the rows of a writer without a file."""
        values, ends = np.frombuffer(self._values, np.int32), np.frombuffer(self._ends, np.int64)
        for part in (values, ends):
            self._hash.update(part)
        return RowStore(values, ends.reshape(-1, self._parts), self._hash.hexdigest()[:32])

    def seal(self, facts: dict[str, Any]) -> None:
        """Complete the file; ``facts`` are kept in it as JSON."""
        self._write(self._values)
        self._write(self._ends)
        digest = self._hash.hexdigest()[:32]
        head = {"parts": self._parts, "rows": len(self), "values": self._count, "digest": digest, "facts": facts}
        text = json.dumps(head).encode()
        self._write(text)
        self._file.write(FOOTER.pack(len(text), self._hash.digest(), MAGIC))

    def _write(self, content: Any) -> None:
        self._hash.update(content)
        self._file.write(content)


def as_ints(numbers: Sequence[float]) -> list[int]:
    """Return numbers with a fraction as part of a row: two values each, without loss."""
    return np.asarray(numbers, np.float64).view(np.int32).tolist()


def as_floats(values: np.ndarray) -> np.ndarray:
    """Return the numbers that :func:`as_ints` turned into ``values``."""
    return np.array(values).view(np.float64)


def open_rows(path: Path, parts: int) -> tuple[RowStore, dict[str, Any]] | None:
    """Return ``(rows, facts)`` of a file; None where there is none, or it is not whole and as it was sealed."""
    try:
        with path.open("rb") as file:
            head = _sealed_head(file)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if head is None or head["parts"] != parts or head["rows"] < 1:
        return None
    count, rows = head["values"], head["rows"]
    ends = np.fromfile(path, np.int64, rows * parts, offset=4 * count)
    # A plain view of the map: slices of a memmap object take several times as long.
    values = np.asarray(np.memmap(path, np.int32, mode="r", shape=(count,)) if count else np.empty(0, np.int32))
    if (np.diff(ends, prepend=0) < 0).any() or ends[-1] != count:
        return None
    return RowStore(values, ends.reshape(rows, parts), head["digest"]), head["facts"]


def _sealed_head(file: IO[bytes]) -> dict[str, Any] | None:
    """Return the JSON of a file that its footer seals."""
    size = file.seek(0, 2)
    if size < FOOTER.size:
        return None
    file.seek(size - FOOTER.size)
    length, seal, magic = FOOTER.unpack(file.read())
    body = size - FOOTER.size
    if magic != MAGIC or not 0 < length <= body:
        return None
    file.seek(0)
    digest, left = hashlib.sha256(), body
    while block := file.read(min(BLOCK, left)):
        digest.update(block)
        left -= len(block)
    if digest.digest() != seal:
        return None
    file.seek(body - length)
    head = json.loads(file.read(length))
    return head if 4 * head["values"] + 8 * head["rows"] * head["parts"] == body - length else None
