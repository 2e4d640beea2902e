"""What every kind of data does with its rows: read them in batches, tokenise them, account for those it cannot use."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from openrlhf.datasets.cache import cache_key, kept_rows
from openrlhf.datasets.fields import check_keys, check_row
from openrlhf.datasets.formats import Keys
from openrlhf.datasets.store import RowStore, RowWriter
from openrlhf.datasets.templates import Renderer
from openrlhf.errors import DataError

SOURCES = frozenset(
    {"dataset", "dataset_probs", "train_split", "eval_dataset", "eval_split", "max_samples", "tokenizer_chat_template"}
)
"""Flags that say where rows and template come from. Kept rows depend on what came from there, and not on its name."""
logger = logging.getLogger(__name__)


class NothingUsable(DataError):
    """Every row was left out."""


class TokenisedRows:
    """Base of the data sets: subclasses write the rows of a batch in ``_add`` and count what they leave out.

    Where ``PARTS`` is set, rows are lists of that many parts of whole numbers: ``_add`` gives them to ``_writer``,
    afterwards they are in ``_rows``, and :meth:`_read` can keep them in a file.

    Args:
        tokenizer: a Hugging Face tokenizer.
        cfg: ``too_long`` and the flags that the subclass reads.
        limit: most tokens of a row, from the flag ``limit_flag``.
        render: turns the fields of a row into text.
        name: what messages call the data, such as ``"--dataset rows.jsonl"``.

    Attributes:
        dropped: ``Counter`` of rows left out, by reason.
        truncated: number of rows cut at ``limit``.
    """

    FORMATS: ClassVar[Sequence[Keys]] = ()
    """Standard formats of the rows, of :mod:`openrlhf.datasets.formats`."""
    PARTS: ClassVar[int] = 0
    COUNTED: ClassVar[tuple[str, ...]] = ("truncated",)
    """Attributes that count what became of rows, beside ``dropped``."""
    limit_flag = "--max_len"
    marks = ""
    """What :meth:`preview` marks."""
    _writer: RowWriter
    _rows: RowStore

    def __init__(self, tokenizer: Any, cfg: Any, limit: int, render: Renderer, name: str):
        self.tokenizer, self.cfg, self.limit, self.name = tokenizer, cfg, limit, name
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self._render = render

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch; masks tell it from text by position."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def digest(self) -> str | None:
        """Changes with every row, and with their order and number; None without ``PARTS``."""
        return self._rows.digest if self.PARTS else None

    @property
    def spelled_as_text(self) -> int:
        """How many rows spell a special token that is read as plain text."""
        return self._render.rows_spelling if self._render.spelled == "text" else 0

    def __len__(self) -> int:
        return len(self._rows)

    def preview(self, index: int) -> list[str]:
        """Return lines that show a row to a person."""
        raise NotImplementedError

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        raise NotImplementedError

    def _read(self, rows: Any, required: Mapping[str, str], cache: Path | None = None) -> None:
        """Take the rows, each with the keys of ``required`` (key -> flag), and log what became of them.

        ``cache`` is a file to keep them in, or to take them from when it holds just these.
        """
        make = partial(self._make, rows, required)
        flags = {item.name: getattr(self.cfg, item.name) for item in fields(self.cfg) if item.name not in SOURCES}
        settings = (type(self).__name__, type(self.cfg).__name__, flags, self.limit, required)
        key = cache_key(rows, self.tokenizer, *settings) if cache and self.PARTS else None
        if cache and key:
            self._rows, facts = kept_rows(cache, key, self.PARTS, make)
            self._restore(facts)
        elif self.PARTS:
            writer = RowWriter(self.PARTS)
            make(writer)
            self._rows = writer.store()
        else:
            make(None)
        notes = [f"{count} {note}" for note, count in self._notes().items() if count]
        if self.dropped or notes:
            logger.warning("%s: %d rows kept, %s", self.name, len(self), ", ".join([self._dropped(), *notes]))

    def _make(self, rows: Any, required: Mapping[str, str], writer: RowWriter | None) -> dict[str, Any]:
        """Read every row; return what became of them. Raises :class:`NothingUsable` when none is left."""
        if writer is not None:
            self._writer = writer
        for batch in numbered_batches(rows, required, self.name):
            self._add(batch)
        self.dropped = +self.dropped
        if not len(self if writer is None else writer):
            flags = ", ".join([*required.values(), self.limit_flag])
            raise NothingUsable(f"{self.name}: no row can be used; {self._dropped()}; check the data and {flags}")
        counted = {name: getattr(self, name) for name in self.COUNTED}
        return {"dropped": self.dropped, "counted": counted, "spelled": self._render.rows_spelling}

    def _restore(self, facts: Mapping[str, Any]) -> None:
        """Take what :meth:`_make` returned when the rows were made."""
        self.dropped, self._render.rows_spelling = Counter(facts["dropped"]), facts["spelled"]
        for name, count in facts["counted"].items():
            setattr(self, name, count)

    def _notes(self) -> dict[str, int]:
        """Return what else happened to rows, and to how many."""
        return {
            f"cut at {self.limit_flag} {self.limit}": self.truncated,
            self._render.spelling_note(): self._render.rows_spelling,
        }

    def _dropped(self) -> str:
        """Return how many rows were left out and why."""
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common())
        count = sum(self.dropped.values())
        return f"{count} dropped ({reasons})" if count else "none dropped"

    def _where(self, number: int) -> str:
        """Return how messages call a row; numbers count from 0 as uids do."""
        return f"{self.name}: row {number}"

    def _keeps(self, length: int, number: int) -> bool:
        """Return whether a row of ``length`` tokens is kept, cut where it is too long, as ``--too_long`` says."""
        if length <= self.limit:
            return True
        if self.cfg.too_long == "error":
            raise DataError(
                f"{self._where(number)} has {length} tokens, more than {self.limit_flag} {self.limit}: raise it, "
                "or let --too_long cut or drop such rows"
            )
        if self.cfg.too_long == "drop":
            self.dropped[f"longer than {self.limit_flag} {self.limit}"] += 1
            return False
        self.truncated += 1
        return True


def numbered_batches(
    rows: Any, required: Mapping[str, str], name: str, size: int = 1000
) -> Iterator[list[tuple[int, dict]]]:
    """Yield batches of ``(row number, row)``.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        required: key every row must have -> flag that names it.
        name: what messages call the data.

    Raises:
        DataError: a key is missing, a value is neither text nor messages, or there are no rows.
    """
    if len(rows) == 0:
        raise DataError(f"{name}: no rows; give data with at least one")
    if hasattr(rows, "column_names"):
        check_keys(rows.column_names, required, name)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        if isinstance(batch, dict):
            columns = list(batch)
            batch = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        for number, row in enumerate(batch, start):
            check_row(row, required, f"{name}: row {number}")
        yield list(enumerate(batch, start))
