"""From text to tokens: no token is added, and what is guarded is read as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from openrlhf.errors import DataError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which no text holds: they enclose the guarded spelling of a special token."""
GUARDED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")


def special_tokens(tokenizer: Any) -> dict[int, Any]:
    """Return ``{id: token}`` of everything the tokenizer treats as a special token."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def has_generation_block(tokenizer: Any) -> bool:
    """Whether the chat template itself marks what the assistant says."""
    return GENERATION_BLOCK.search(tokenizer.get_chat_template()) is not None


def eos_of(tokenizer: Any) -> int:
    """Return the id of the end-of-sequence token; raise :class:`DataError` when there is none."""
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {tokenizer.name_or_path!r} has no eos token: answers could not end")
    return tokenizer.eos_token_id


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, with no token added and guarded parts read as plain text."""
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [_tokenize_guarded(tokenizer, text) if OPEN in text else ids for text, ids in zip(texts, rows, strict=True)]


def _tokenize_guarded(tokenizer: Any, text: str) -> list[int]:
    special = set(special_tokens(tokenizer)) - {tokenizer.unk_token_id}
    ids: list[int] = []
    for number, part in enumerate(GUARDED.split(text)):
        inside = number % 2 == 1
        piece = tokenizer(part, add_special_tokens=False, split_special_tokens=inside)["input_ids"] if part else []
        if inside and not special.isdisjoint(piece):  # a vocabulary of whole words may hold it as a word
            piece = [i for letter in part for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
        ids += piece
    return ids


def unguarded(text: str) -> str:
    """Return ``text`` without the marks around guarded parts."""
    return GUARDED.sub(r"\1", text)


def tokenize_pieces(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Return token ids of every piece of every row; a row's pieces are consecutive parts of one text.

    The ids of a row, put together, are those of the whole text. Only where a token of the whole text would reach
    over the border of two pieces, the second piece is tokenised by itself: a prompt then has the same ids here as
    when it is given to generation.
    """
    prefixes = ["".join(row[: end + 1]) for row in rows for end in range(len(row))]
    prefix_ids = iter(tokenize(tokenizer, prefixes))
    result: list[list[list[int]]] = []
    alone: list[tuple[int, int]] = []
    for row_number, row in enumerate(rows):
        before: list[int] = []
        pieces = []
        for number in range(len(row)):
            ids = next(prefix_ids)
            if ids[: len(before)] != before:
                alone.append((row_number, number))
            pieces.append(ids[len(before) :])
            before = ids
        result.append(pieces)
    for (row_number, number), ids in zip(alone, tokenize(tokenizer, [rows[r][n] for r, n in alone]), strict=True):
        result[row_number][number] = ids
    return result
