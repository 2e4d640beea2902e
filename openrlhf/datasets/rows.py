"""Reading rows in batches, and the account of rows that cannot be used."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from openrlhf.datasets.local_files import check_keys
from openrlhf.errors import DataError

logger = logging.getLogger(__name__)


def numbered_batches(rows: Any, required: Mapping[str, str], size: int = 1000) -> Iterator[list[tuple[int, dict]]]:
    """Yield batches of ``(row number, row)``.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        required: key every row must have -> flag that names it.

    Raises:
        DataError: a key is missing, or there are no rows.
    """
    if len(rows) == 0:
        raise DataError("the data set has no rows")
    if hasattr(rows, "column_names"):
        check_keys(rows.column_names, required, "the data set")
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        if isinstance(batch, dict):
            columns = list(batch)
            batch = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        for number, row in enumerate(batch, start):
            check_keys(row, required, row_name(number))
        yield list(enumerate(batch, start))


def row_name(number: int) -> str:
    """Return how messages call a row; numbers count from 0 as uids do."""
    return f"row {number}"


def account(what: str, kept: int, dropped: Counter, notes: Mapping[str, int]) -> None:
    """Log what became of the rows; raise :class:`DataError` when none is left.

    Args:
        what: names the data, such as ``"SFT data"``.
        dropped: rows left out, by reason.
        notes: other things that happened to rows, such as ``{"cut at --max_len 512": 3}``.
    """
    reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
    said = [f"{sum(dropped.values())} dropped ({reasons})"] if dropped else []
    said += [f"{count} {note}" for note, count in notes.items() if count]
    if not kept:
        raise DataError(f"{what}: no row can be used; {', '.join(said)}")
    if said:
        logger.warning("%s: %d rows kept, %s", what, kept, ", ".join(said))
