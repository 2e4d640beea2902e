"""Demonstrations for supervised fine-tuning: token ids and the positions that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openrlhf.config.checks import NO_DEMONSTRATION
from openrlhf.datasets import tokens
from openrlhf.datasets.batch import TokenBatch, pad_rows
from openrlhf.datasets.fields import as_messages, assistant_turns, is_blank
from openrlhf.datasets.formats import DEMONSTRATIONS
from openrlhf.datasets.preview import marked_text
from openrlhf.datasets.rows import TokenisedRows
from openrlhf.datasets.templates import Renderer
from openrlhf.errors import UsageError

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SFTRow:
    """One demonstration.

    Attributes:
        token_ids: ``L`` ids.
        loss_mask: ``L - 1`` booleans; entry ``t`` says whether predicting ``token_ids[t + 1]`` is trained.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    tokenizer: Any = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The tokens as text, special tokens included."""
        return self.tokenizer.decode(self.token_ids)


class SFTDataset(TokenisedRows):
    """Tokenised demonstrations. A response ends with exactly one eos unless ``max_len`` cut it.

    What is trained: the response; with ``multiturn`` every assistant turn with its end-of-turn token; with
    ``pretrain_mode`` every token of the raw text. Rows that cannot be trained on are left out and counted.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        tokenizer: a Hugging Face tokenizer.
        data_cfg: ``max_len``, ``input_key``, ``output_key``, ``input_template``, ``apply_chat_template``,
            ``multiturn``, ``pretrain_mode``, ``too_long``, ``special_tokens_in_text``.
        name: what messages call the data.
        cache: file to keep the tokenised rows in, and to take them from; without it they stay in memory.

    Attributes:
        dropped: ``Counter`` of rows left out, by reason.
        truncated: number of rows cut at ``max_len``.
        lengths: tokens of each row.

    Raises:
        DataError: a key is missing, a value has the wrong type, no row is left.
    """

    FORMATS = DEMONSTRATIONS
    PARTS = 2
    """Token ids, and the first and last position of each trained span."""
    COUNTED = ("truncated", "_split_rows")
    marks = "what is trained"
    no_answer = NO_DEMONSTRATION

    def __init__(self, rows: Any, tokenizer: Any, data_cfg: Any, name: str = "the data", cache: Path | None = None):
        raw_text = data_cfg.pretrain_mode
        if not (data_cfg.output_key or data_cfg.apply_chat_template or raw_text):
            raise UsageError(self.no_answer)
        render = Renderer(
            tokenizer,
            None if raw_text else data_cfg.input_template,
            data_cfg.apply_chat_template and not raw_text,
            data_cfg.special_tokens_in_text,
        )
        super().__init__(tokenizer, data_cfg, data_cfg.max_len, render, name)
        self._eos = tokens.eos_of(tokenizer)
        self._split_rows = 0
        self._marked = data_cfg.multiturn and tokenizer.is_fast and tokens.has_generation_block(tokenizer)
        self._read(rows, self._required(), cache)

    def __getitem__(self, index: int) -> SFTRow:
        ids, spans = self._rows[index][:2]
        trained = [False] * len(ids)
        for start, end in spans.reshape(-1, 2).tolist():
            trained[start:end] = [True] * (end - start)
        return SFTRow(ids.tolist(), trained[1:], self.tokenizer)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self._rows.lengths(0)

    def collate(self, rows: Sequence[SFTRow]) -> TokenBatch:
        """Return the rows padded on the right; no rows give one dummy row that trains nothing."""
        if not rows:
            rows = [SFTRow([self._eos, self._eos], [False], self.tokenizer)]
        sequences, attention_mask = pad_rows([row.token_ids for row in rows], self.pad_id)
        loss_mask = torch.zeros(len(rows), sequences.shape[1] - 1, dtype=torch.bool)
        for index, row in enumerate(rows):
            loss_mask[index, : len(row.loss_mask)] = torch.tensor(row.loss_mask)
        return TokenBatch(sequences, attention_mask, loss_mask)

    def preview(self, index: int) -> list[str]:
        """Return one line that shows a row with the trained part marked."""
        row = self[index]
        return [marked_text(self.tokenizer, row.token_ids, [False, *row.loss_mask])]

    def _required(self) -> dict[str, str]:
        """Return key that every row must have -> flag that names it."""
        answer = {self.cfg.output_key: "--output_key"} if self.cfg.output_key and not self.cfg.pretrain_mode else {}
        return {self.cfg.input_key: "--input_key"} | answer

    def _notes(self) -> dict[str, int]:
        split = "conversations split into one row a turn (the chat template rewrites earlier turns)"
        return super()._notes() | {split: self._split_rows}

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        pieces: list[tuple[int, Sequence[str]]] = []
        for number, row in batch:
            if self.cfg.multiturn:
                self._add_conversation(row, number, pieces)
                continue
            where = self._where(number)
            cut = self._raw_text(row, where) if self.cfg.pretrain_mode else self._single_turn(row, where)
            if isinstance(cut, str):
                self.dropped[cut] += 1
            else:
                pieces.append((number, cut))
        encoded_rows = tokens.tokenize_pieces(self.tokenizer, [texts for _, texts in pieces])
        for (number, _), encoded in zip(pieces, encoded_rows, strict=True):
            self._store_pieces(number, encoded)

    def _raw_text(self, row: dict, where: str) -> Sequence[str] | str:
        text = self._render.text(row[self.cfg.input_key], where)
        return ["", text] if text.strip() else "empty text"

    def _single_turn(self, row: dict, where: str) -> Sequence[str] | str:
        """Return ``(prompt text, response text)``, or the reason why the row is left out."""
        prompt = row[self.cfg.input_key]
        if self.cfg.output_key:
            response = row[self.cfg.output_key]
        else:
            messages = self._messages(prompt, where)
            if not messages or messages[-1]["role"] != "assistant":
                return "last message is not the assistant's"
            prompt, response = messages[:-1], messages[-1:]
        if is_blank(prompt):
            return "empty prompt"
        if is_blank(response):
            return "empty response"
        return self._render.pair(prompt, response, where)

    def _messages(self, value: Any, where: str) -> list[dict]:
        if isinstance(value, str):
            raise UsageError(f"{where}: {self.cfg.input_key!r} is text, not a list of messages; set --output_key")
        return as_messages(value, "user", where)

    def _add_conversation(self, row: dict, number: int, pieces: list[tuple[int, Sequence[str]]]) -> None:
        where = self._where(number)
        if self.cfg.output_key:
            messages = as_messages(row[self.cfg.input_key], "user", where)
            messages += as_messages(row[self.cfg.output_key], "assistant", where)
        else:
            messages = self._messages(row[self.cfg.input_key], where)
        turns = assistant_turns(messages)
        if not turns:
            self.dropped["no assistant turn"] += 1
            return
        messages = messages[: turns[-1] + 1]
        if self._marked and self._render.guard(messages, where) == messages:
            self._store(number, *self._render.marked(messages, where))
        elif cut := self._render.turns(messages, where):
            pieces.append((number, cut))
        else:
            self._split_rows += 1
            pieces += [(number, self._render.pair(messages[:i], messages[i : i + 1], where)) for i in turns]

    def _store_pieces(self, number: int, encoded: list[list[int]]) -> None:
        ids: list[int] = []
        spans = []
        for index, piece in enumerate(encoded):
            if index % 2 and piece:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        self._store(number, ids, tuple(spans))

    def _store(self, number: int, ids: list[int], spans: Spans) -> None:
        """Close the row with one eos, cut it at ``max_len`` and keep it when something is left to train."""
        limit = self.limit
        if not spans:
            self.dropped["no trained token"] += 1
            return
        end = spans[-1][1]
        ids = ids[:end]
        if not self.cfg.pretrain_mode and ids[-1] != self._eos:
            ids.append(self._eos)
            spans = (*spans[:-1], (spans[-1][0], end + 1))
        if self.cfg.too_long != "error" and spans[0][0] and spans[0][0] >= limit - 2:
            self.dropped[f"prompt too long for --max_len {limit}"] += 1
            return
        if not self._keeps(len(ids), number):
            return
        spans = tuple((start, min(end, limit)) for start, end in spans if start < limit)
        if all(end < 2 for _, end in spans):
            self.dropped["no trained token"] += 1
            return
        self._writer.add(ids[:limit], [edge for span in spans for edge in span], *self._beside(number))

    def _beside(self, number: int) -> list[list[int]]:
        """Return the parts of a row that stand beside its tokens and spans."""
        return []
