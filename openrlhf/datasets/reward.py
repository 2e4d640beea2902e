"""Preference pairs for reward models and DPO: the chosen and the rejected answer to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openrlhf.datasets import tokens
from openrlhf.datasets.batch import PreferenceBatch, pad_rows
from openrlhf.datasets.fields import as_messages, is_blank
from openrlhf.datasets.formats import PAIRS, shared_prompt
from openrlhf.datasets.preview import marked_text
from openrlhf.datasets.rows import TokenisedRows
from openrlhf.datasets.store import as_floats, as_ints
from openrlhf.datasets.templates import Renderer
from openrlhf.errors import UsageError


@dataclass(frozen=True)
class PreferenceRow:
    """One pair.

    Attributes:
        chosen, rejected: token ids of prompt and answer; both end with eos.
        chosen_prompt, rejected_prompt: how many of the first ids are the prompt.
        margin: how much better the chosen answer is said to be, 0 when the data has none.
    """

    chosen: list[int]
    rejected: list[int]
    chosen_prompt: int
    rejected_prompt: int
    margin: float


class PreferenceDataset(TokenisedRows):
    """Tokenised pairs. An answer longer than ``max_len`` is cut and still ends with eos.

    Pairs with an empty answer or prompt, and pairs whose two sides are the same tokens, are left out and counted.
    Without a prompt the tokens that both texts begin with are the prompt.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        tokenizer: a Hugging Face tokenizer.
        data_cfg: ``max_len``, ``prompt_key`` (or None), ``chosen_key``, ``rejected_key``, ``input_template``,
            ``apply_chat_template``, ``too_long``, ``special_tokens_in_text``. A column ``margin`` is read when it is
            there.
        name: what messages call the data.
        cache: file to keep the tokenised pairs in, and to take them from; without it they stay in memory.

    Attributes:
        dropped: ``Counter`` of pairs left out, by reason.
        truncated: number of pairs with a side cut at ``max_len``.
        lengths: tokens of both sides of each pair.

    Raises:
        DataError: a key is missing, a value has the wrong type, no pair is left.
    """

    FORMATS = PAIRS
    PARTS = 3
    """The ids of the two sides, and (prompt of the chosen, prompt of the rejected, the two halves of the margin)."""
    marks = "the answer"

    def __init__(self, rows: Any, tokenizer: Any, data_cfg: Any, name: str = "the data", cache: Path | None = None):
        render = Renderer(
            tokenizer, data_cfg.input_template, data_cfg.apply_chat_template, data_cfg.special_tokens_in_text
        )
        super().__init__(tokenizer, data_cfg, data_cfg.max_len, render, name)
        self._eos = tokens.eos_of(tokenizer)
        required = {data_cfg.chosen_key: "--chosen_key", data_cfg.rejected_key: "--rejected_key"}
        if data_cfg.prompt_key:
            required[data_cfg.prompt_key] = "--prompt_key"
        self._read(rows, required, cache)

    def __getitem__(self, index: int) -> PreferenceRow:
        chosen, rejected, rest = self._rows[index]
        return PreferenceRow(chosen.tolist(), rejected.tolist(), *rest[:2].tolist(), float(as_floats(rest[2:])[0]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both sides of each pair: they go through the model together."""
        return self._rows.lengths(0) + self._rows.lengths(1)

    def collate(self, rows: Sequence[PreferenceRow]) -> PreferenceBatch:
        """Return the pairs padded on the right, chosen rows first; ``loss_mask`` is true on the answers.

        No rows give one dummy pair whose ``loss_mask`` is false everywhere: a pair of weight zero.
        """
        if not rows:
            rows = [PreferenceRow([self._eos] * 2, [self._eos] * 2, 2, 2, 0.0)]
        sides = [(row.chosen, row.chosen_prompt) for row in rows] + [
            (row.rejected, row.rejected_prompt) for row in rows
        ]
        sequences, attention_mask = pad_rows([ids for ids, _ in sides], self.pad_id)
        loss_mask = attention_mask[:, 1:].clone()
        for index, (_, prompt) in enumerate(sides):
            loss_mask[index, : max(prompt - 1, 0)] = False
        margin = torch.tensor([row.margin for row in rows], dtype=torch.float32)
        return PreferenceBatch(sequences, attention_mask, loss_mask, margin)

    def preview(self, index: int) -> list[str]:
        """Return two lines that show a pair with the answers marked; a side is scored at its last token."""
        row = self[index]
        sides = {"chosen  ": (row.chosen, row.chosen_prompt), "rejected": (row.rejected, row.rejected_prompt)}
        return [
            f"{title} {marked_text(self.tokenizer, ids, [t >= prompt for t in range(len(ids))])}"
            for title, (ids, prompt) in sides.items()
        ]

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        texts: list[tuple[str, str]] = []
        kept: list[tuple[int, float]] = []
        for number, row in batch:
            answers = row[self.cfg.chosen_key], row[self.cfg.rejected_key]
            empty = "answer" if any(map(is_blank, answers)) else None
            if self.cfg.prompt_key and is_blank(row[self.cfg.prompt_key]):
                empty = "prompt"
            if empty:
                self.dropped[f"empty {empty}"] += 1
                continue
            texts += self._sides(row, *answers, self._where(number))
            kept.append((number, float(row.get("margin") or 0)))
        sides = [self._close(*pieces) for pieces in tokens.tokenize_pieces(self.tokenizer, texts)]
        for chosen, rejected, (number, margin) in zip(sides[::2], sides[1::2], kept, strict=True):
            self._store(chosen, rejected, number, margin)

    def _sides(self, row: dict, chosen: Any, rejected: Any, where: str) -> list[tuple[str, str]]:
        """Return ``(prompt text, answer text)`` of both sides.

        Without ``--prompt_key`` the prompt of two conversations is what they share before they part.
        """
        if self.cfg.prompt_key:
            return [self._render.pair(row[self.cfg.prompt_key], answer, where) for answer in (chosen, rejected)]
        if not self.cfg.apply_chat_template:
            return [("", self._render.text(answer, where).rstrip("\n")) for answer in (chosen, rejected)]
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise UsageError(f"{where}: with --apply_chat_template text answers need --prompt_key (or message lists)")
        sides = [as_messages(answer, "assistant", where) for answer in (chosen, rejected)]
        start = shared_prompt(*sides)
        return [self._render.pair(messages[:start], messages[start:], where) for messages in sides]

    def _close(self, prompt: list[int], answer: list[int]) -> tuple[list[int], int]:
        """Return ``(ids that end with one eos, prompt length)``, not yet cut."""
        ids = prompt + answer
        return (ids if ids[-1:] == [self._eos] else [*ids, self._eos]), len(prompt)

    def _cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self.limit else [*ids[: self.limit - 1], self._eos]

    def _store(
        self, chosen: tuple[list[int], int], rejected: tuple[list[int], int], number: int, margin: float
    ) -> None:
        if chosen[0] == rejected[0]:
            self.dropped["chosen equals rejected"] += 1
            return
        if not (self.cfg.prompt_key or self.cfg.apply_chat_template):
            chosen, rejected = ((ids, _shared(chosen[0], rejected[0])) for ids, _ in (chosen, rejected))
        sides = [self._cut(ids) for ids, _ in (chosen, rejected)]
        if sides[0] == sides[1] and self.cfg.too_long == "cut":
            self.dropped[f"equal after the cut at --max_len {self.limit}"] += 1
            return
        if self._keeps(max(len(chosen[0]), len(rejected[0])), number):
            prompts = [min(prompt, len(ids)) for ids, (_, prompt) in zip(sides, (chosen, rejected), strict=True)]
            self._writer.add(*sides, [*prompts, *as_ints([margin])])


def _shared(left: list[int], right: list[int]) -> int:
    """Return how many tokens two different rows have in common at their beginning."""
    return next((at for at, (one, other) in enumerate(zip(left, right)) if one != other), min(len(left), len(right)))
