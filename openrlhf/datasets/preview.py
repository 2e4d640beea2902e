"""Rows as a person checks them before a run: what the model reads, with what is trained between « and »."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

SAMPLES = 3
OPENS, CLOSES = "«", "»"
ENDS = 36
"""Characters shown of each end of a long piece of text."""
PIECES = 9
"""Most pieces shown of a row; a conversation of many turns has more."""


def sample_lines(data: Any) -> list[str]:
    """Return lines that show :data:`SAMPLES` rows of ``data`` (a ``TokenisedRows``), spread evenly over it."""
    shown = min(SAMPLES, len(data))
    legend = f", {data.marks} between {OPENS} and {CLOSES}" if data.marks else ""
    lines = [f"samples  {shown} of {len(data):,} rows as the model reads them{legend}"]
    for index in (len(data) * number // shown for number in range(shown)):
        for number, line in enumerate(data.preview(index)):
            lines.append(f"  {'' if number else f'{index + 1:,}':>6} {line}")
    return lines


def marked_text(tokenizer: Any, ids: Sequence[int], marks: Sequence[bool]) -> str:
    """Return the tokens as one line of text, special tokens included, with the marked ones between « and »."""
    runs = [(mark, [token for _, token in run]) for mark, run in groupby(zip(marks, ids), key=lambda pair: pair[0])]
    pieces = []
    for mark, tokens in runs:
        text = shortened(tokenizer.decode(tokens))
        pieces.append(f"{OPENS}{text}{CLOSES}" if mark else text)
    if len(pieces) > PIECES:
        pieces = [*pieces[: PIECES // 2], f" ... {len(pieces) - PIECES + 1} more ... ", *pieces[-(PIECES // 2) :]]
    return "".join(pieces)


def shortened(text: str) -> str:
    """Return ``text`` on one line, what cannot be printed escaped, and its middle left out when it is long."""
    if len(text) > 2 * ENDS + 10:
        text = f"{text[:ENDS]} ... {text[-ENDS:]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
