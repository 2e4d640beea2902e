"""Demonstrations for supervised fine-tuning: token ids and the positions that are trained."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from openrlhf.datasets import templates
from openrlhf.datasets.batch import TokenBatch, pad_rows
from openrlhf.datasets.rows import account, numbered_batches, row_name
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


class SFTDataset:
    """Tokenised demonstrations. A response ends with exactly one eos unless ``max_len`` cut it.

    What is trained: the response; with ``multiturn`` every assistant turn with its end-of-turn token; with
    ``pretrain_mode`` every token of the raw text. Rows that cannot be trained on are left out and counted.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        tokenizer: a Hugging Face tokenizer.
        data_cfg: ``max_len``, ``input_key``, ``output_key``, ``input_template``, ``apply_chat_template``,
            ``multiturn``, ``pretrain_mode``.

    Attributes:
        dropped: ``Counter`` of rows left out, by reason.
        truncated: number of rows cut at ``max_len``.
        lengths: tokens of each row.

    Raises:
        DataError: a key is missing, a value has the wrong type, no row is left.
    """

    def __init__(self, rows: Any, tokenizer: Any, data_cfg: Any):
        self.tokenizer = tokenizer
        self.cfg = data_cfg
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self._eos = templates.eos_of(tokenizer)
        self._ids: list[array] = []
        self._spans: list[Spans] = []
        self._split_rows = 0
        raw_text = data_cfg.pretrain_mode
        self._render = templates.Renderer(
            tokenizer,
            None if raw_text else data_cfg.input_template,
            data_cfg.apply_chat_template and not raw_text,
        )
        self._marked = data_cfg.multiturn and templates.has_generation_block(tokenizer)
        required = {data_cfg.input_key: "--input_key"}
        if data_cfg.output_key and not raw_text:
            required[data_cfg.output_key] = "--output_key"
        for batch in numbered_batches(rows, required):
            self._add(batch)
        notes = {
            f"cut at --max_len {data_cfg.max_len}": self.truncated,
            "conversations split into one row a turn (the chat template rewrites earlier turns)": self._split_rows,
        }
        account("SFT data", len(self), self.dropped, notes)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> SFTRow:
        ids = self._ids[index].tolist()
        trained = [False] * len(ids)
        for start, end in self._spans[index]:
            trained[start:end] = [True] * (end - start)
        return SFTRow(ids, trained[1:], self.tokenizer)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(ids) for ids in self._ids]

    def collate(self, rows: Sequence[SFTRow]) -> TokenBatch:
        """Return the rows padded on the right; no rows give one dummy row that trains nothing."""
        pad_id = self._eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        if not rows:
            rows = [SFTRow([self._eos, self._eos], [False], self.tokenizer)]
        sequences, attention_mask = pad_rows([row.token_ids for row in rows], pad_id)
        loss_mask = torch.zeros(len(rows), sequences.shape[1] - 1, dtype=torch.bool)
        for index, row in enumerate(rows):
            loss_mask[index, : len(row.loss_mask)] = torch.tensor(row.loss_mask)
        return TokenBatch(sequences, attention_mask, loss_mask)

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        pieces: list[Sequence[str]] = []
        for number, row in batch:
            if self.cfg.pretrain_mode:
                text = templates.as_text(row[self.cfg.input_key], row_name(number))
                self._keep_or_drop(pieces, ["", text] if text.strip() else "empty text")
            elif self.cfg.multiturn:
                self._add_conversation(row, row_name(number), pieces)
            else:
                self._keep_or_drop(pieces, self._single_turn(row, row_name(number)))
        for encoded in templates.tokenize_pieces(self.tokenizer, pieces):
            self._store_pieces(encoded)

    def _keep_or_drop(self, pieces: list[Sequence[str]], row: Sequence[str] | str) -> None:
        if isinstance(row, str):
            self.dropped[row] += 1
        else:
            pieces.append(row)

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
        if templates.is_blank(prompt):
            return "empty prompt"
        if templates.is_blank(response):
            return "empty response"
        return self._render.pair(prompt, response, where)

    def _messages(self, value: Any, where: str) -> list[dict]:
        if isinstance(value, str):
            raise UsageError(f"{where}: {self.cfg.input_key!r} is text, not a list of messages; set --output_key")
        return templates.as_messages(value, "user", where)

    def _add_conversation(self, row: dict, where: str, pieces: list[Sequence[str]]) -> None:
        if self.cfg.output_key:
            messages = templates.as_messages(row[self.cfg.input_key], "user", where)
            messages += templates.as_messages(row[self.cfg.output_key], "assistant", where)
        else:
            messages = self._messages(row[self.cfg.input_key], where)
        turns = templates.assistant_turns(messages)
        if not turns:
            self.dropped["no assistant turn"] += 1
        elif self._marked:
            self._store_marked(messages[: turns[-1] + 1])
        elif cut := self._render.turns(messages[: turns[-1] + 1], where):
            pieces.append(cut)
        else:
            self._split_rows += 1
            pieces += [self._render.pair(messages[:i], messages[i : i + 1], where) for i in turns]

    def _store_marked(self, messages: list[dict]) -> None:
        """Take the spans that the template marks with ``{% generation %}``, the end-of-turn token included."""
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        special = templates.special_tokens(self.tokenizer)
        for t in range(1, len(ids)):
            if mask[t - 1] and ids[t] in special and ids[t - 1] not in special:
                mask[t] = 1
        edges = [t for t in range(len(ids) + 1) if (t and mask[t - 1]) != (t < len(ids) and mask[t])]
        self._store(ids, tuple(zip(edges[::2], edges[1::2], strict=True)))

    def _store_pieces(self, encoded: list[list[int]]) -> None:
        ids: list[int] = []
        spans = []
        for number, piece in enumerate(encoded):
            if number % 2 and piece:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        self._store(ids, tuple(spans))

    def _store(self, ids: list[int], spans: Spans) -> None:
        """Close the row with one eos, cut it at ``max_len`` and keep it when something is left to train."""
        limit = self.cfg.max_len
        if not spans:
            self.dropped["no trained token"] += 1
            return
        if spans[0][0] and spans[0][0] >= limit - 2:
            self.dropped["prompt too long"] += 1
            return
        end = spans[-1][1]
        ids = ids[:end]
        if not self.cfg.pretrain_mode and ids[-1] != self._eos:
            ids.append(self._eos)
            spans = (*spans[:-1], (spans[-1][0], end + 1))
        self.truncated += len(ids) > limit
        ids = ids[:limit]
        spans = tuple((start, min(end, limit)) for start, end in spans if start < limit)
        if all(end < 2 for _, end in spans):
            self.dropped["no trained token"] += 1
            return
        self._ids.append(array("i", ids))
        self._spans.append(spans)
