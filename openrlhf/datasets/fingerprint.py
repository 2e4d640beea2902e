"""One hash for all rows of a data set as training sees them: tokens, masks, texts, labels, in their order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any


def fingerprint(rows: Sequence[Any]) -> str:
    """Return 32 hexadecimal digits that change with any row, and with the order and the number of rows.

    ``rows`` has a length and items; of a dataclass the fields that its equality compares are read. Rows that know
    their own ``digest`` are asked for it.
    """
    if digest := getattr(rows, "digest", None):
        return digest
    digest = hashlib.sha256()
    for number in range(len(rows)):
        for value in _values(rows[number]):
            part = _bytes(value)
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()[:32]


def _values(row: Any) -> list[Any]:
    return [getattr(row, item.name) for item in fields(row) if item.compare] if is_dataclass(row) else [row]


def _bytes(value: Any) -> bytes:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
        return array("q", value).tobytes()
    return repr(value).encode()
