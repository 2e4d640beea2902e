"""Preference pairs for reward models: the chosen and the rejected answer to one prompt."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openrlhf.datasets import templates
from openrlhf.datasets.batch import PreferenceBatch, pad_rows
from openrlhf.datasets.rows import account, numbered_batches, row_name
from openrlhf.errors import DataError, UsageError


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


class PreferenceDataset:
    """Tokenised pairs. An answer longer than ``max_len`` is cut and still ends with eos.

    Pairs with an empty answer, and pairs whose two sides are the same tokens, are left out and counted.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        tokenizer: a Hugging Face tokenizer.
        data_cfg: ``max_len``, ``prompt_key`` (or None), ``chosen_key``, ``rejected_key``, ``input_template``,
            ``apply_chat_template``. A column ``margin`` is read when it is there.

    Attributes:
        dropped: ``Counter`` of pairs left out, by reason.
        truncated: number of pairs with a side cut at ``max_len``.
        lengths: tokens of the longer side of each pair.

    Raises:
        DataError: a key is missing, a value has the wrong type, no pair is left.
    """

    def __init__(self, rows: Any, tokenizer: Any, data_cfg: Any):
        self.tokenizer = tokenizer
        self.cfg = data_cfg
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self._eos = templates.eos_of(tokenizer)
        self._pairs: list[tuple[array, array, int, int, float]] = []
        self._render = templates.Renderer(tokenizer, data_cfg.input_template, data_cfg.apply_chat_template)
        required = {data_cfg.chosen_key: "--chosen_key", data_cfg.rejected_key: "--rejected_key"}
        if data_cfg.prompt_key:
            required[data_cfg.prompt_key] = "--prompt_key"
        for batch in numbered_batches(rows, required):
            self._add(batch)
        notes = {f"with an answer cut at --max_len {data_cfg.max_len}": self.truncated}
        account("preference data", len(self), self.dropped, notes)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> PreferenceRow:
        chosen, rejected, chosen_prompt, rejected_prompt, margin = self._pairs[index]
        return PreferenceRow(chosen.tolist(), rejected.tolist(), chosen_prompt, rejected_prompt, margin)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longer side of each pair."""
        return [max(len(pair[0]), len(pair[1])) for pair in self._pairs]

    def collate(self, rows: Sequence[PreferenceRow]) -> PreferenceBatch:
        """Return the pairs padded on the right, chosen rows first; ``loss_mask`` is true on the answers.

        No rows give one dummy pair whose ``loss_mask`` is false everywhere: a pair of weight zero.
        """
        pad_id = self._eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        if not rows:
            rows = [PreferenceRow([self._eos] * 2, [self._eos] * 2, 2, 2, 0.0)]
        sides = [(row.chosen, row.chosen_prompt) for row in rows] + [
            (row.rejected, row.rejected_prompt) for row in rows
        ]
        sequences, attention_mask = pad_rows([ids for ids, _ in sides], pad_id)
        loss_mask = attention_mask[:, 1:].clone()
        for index, (_, prompt) in enumerate(sides):
            loss_mask[index, : max(prompt - 1, 0)] = False
        margin = torch.tensor([row.margin for row in rows], dtype=torch.float32)
        return PreferenceBatch(sequences, attention_mask, loss_mask, margin)

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        texts: list[tuple[str, str]] = []
        margins: list[float] = []
        for number, row in batch:
            chosen, rejected = row[self.cfg.chosen_key], row[self.cfg.rejected_key]
            if templates.is_blank(chosen) or templates.is_blank(rejected):
                self.dropped["empty answer"] += 1
                continue
            texts += [self._side(row, answer, row_name(number)) for answer in (chosen, rejected)]
            margins.append(_margin(row.get("margin"), row_name(number)))
        sides = [self._close(*pieces) for pieces in templates.tokenize_pieces(self.tokenizer, texts)]
        for chosen_side, rejected_side, margin in zip(sides[::2], sides[1::2], margins, strict=True):
            self._store(chosen_side, rejected_side, margin)

    def _side(self, row: dict, answer: Any, where: str) -> tuple[str, str]:
        """Return ``(prompt text, answer text)``; without ``--prompt_key`` a conversation brings its own prompt."""
        if self.cfg.prompt_key:
            return self._render.pair(row[self.cfg.prompt_key], answer, where)
        if not self.cfg.apply_chat_template:
            return "", templates.as_text(answer, where).rstrip("\n")
        if isinstance(answer, str):
            raise UsageError(f"{where}: with --apply_chat_template text answers need --prompt_key (or message lists)")
        messages = templates.as_messages(answer, "assistant", where)
        return self._render.pair(messages[:-1], messages[-1:], where)

    def _close(self, prompt: list[int], answer: list[int]) -> tuple[list[int], int, bool]:
        """Return ``(ids that end with one eos, prompt length, whether max_len cut them)``."""
        ids = prompt + answer
        if ids[-1:] != [self._eos]:
            ids.append(self._eos)
        limit = self.cfg.max_len
        cut = len(ids) > limit
        if cut:
            ids = [*ids[: limit - 1], self._eos]
        return ids, min(len(prompt), len(ids)), cut

    def _store(
        self, chosen: tuple[list[int], int, bool], rejected: tuple[list[int], int, bool], margin: float
    ) -> None:
        if chosen[0] == rejected[0]:
            cut = chosen[2] or rejected[2]
            self.dropped["equal after truncation" if cut else "chosen equals rejected"] += 1
            return
        self.truncated += chosen[2] or rejected[2]
        self._pairs.append((array("i", chosen[0]), array("i", rejected[0]), chosen[1], rejected[1], margin))


def _margin(value: Any, where: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: the margin is a number; found {type(value).__name__}")
    return float(value)
