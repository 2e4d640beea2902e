"""Answers to be rated: a prompt and an answer as the token ids that a reward model reads."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from openrlhf.datasets import tokens
from openrlhf.datasets.fields import as_messages, as_text
from openrlhf.datasets.formats import DEMONSTRATIONS
from openrlhf.datasets.preview import marked_text
from openrlhf.datasets.rows import TokenisedRows
from openrlhf.datasets.templates import Renderer
from openrlhf.errors import DataError


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        uid: the number of its row, as text.
        prompt: the prompt with its template applied.
        answer: the answer; with a chat template as the template renders it.
        token_ids: both, closed by one eos, at most ``max_len``.
    """

    uid: str
    prompt: str
    answer: str
    token_ids: tuple[int, ...]


class AnswerDataset(TokenisedRows):
    """Prompts with their answers, empty ones too. What is longer than ``max_len`` loses the tokens before its eos.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        tokenizer: the reward model's.
        data_cfg: ``max_len``, ``input_key``, ``output_key`` (None: the last message of the input), ``input_template``,
            ``apply_chat_template``, ``too_long``, ``special_tokens_in_text``.
        name: what messages call the data.

    Attributes:
        dropped: ``Counter`` of rows left out, by reason.
        truncated: number of rows cut at ``max_len``.

    Raises:
        DataError: a key is missing, a value has the wrong type, no row is left.
    """

    FORMATS = DEMONSTRATIONS

    def __init__(self, rows: Any, tokenizer: Any, data_cfg: Any, name: str = "the data"):
        render = Renderer(
            tokenizer, data_cfg.input_template, data_cfg.apply_chat_template, data_cfg.special_tokens_in_text
        )
        super().__init__(tokenizer, data_cfg, data_cfg.max_len, render, name)
        self._eos = tokens.eos_of(tokenizer)
        self._answers: list[tuple[int, str, str, array]] = []
        answer = {data_cfg.output_key: "--output_key"} if data_cfg.output_key else {}
        self._read(rows, {data_cfg.input_key: "--input_key"} | answer)

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index: int) -> Answer:
        number, prompt, answer, ids = self._answers[index]
        return Answer(str(number), prompt, answer, tuple(ids))

    def preview(self, index: int) -> list[str]:
        """Return one line that shows what the reward model reads."""
        ids = self[index].token_ids
        return [marked_text(self.tokenizer, ids, [False] * len(ids))]

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        found = [(number, self._sides(row, self._where(number))) for number, row in batch]
        texts = [(number, *sides, self._render.pair(*sides, self._where(number))) for number, sides in found]
        encoded = tokens.tokenize_pieces(self.tokenizer, [pieces for *_, pieces in texts])
        for (number, _, answer, (before, after)), ids in zip(texts, encoded, strict=True):
            closed = self._closed([index for piece in ids for index in piece])
            if not self._keeps(len(closed), number):
                continue
            kept = closed if len(closed) <= self.limit else [*closed[: self.limit - 1], self._eos]
            said = tokens.unguarded(after) if self._render.chat else as_text(answer, self._where(number))
            self._answers.append((number, tokens.unguarded(before), said, array("i", kept)))

    def _sides(self, row: dict, where: str) -> tuple[Any, Any]:
        """Return prompt and answer as the row has them."""
        prompt = row[self.cfg.input_key]
        if self.cfg.output_key:
            return prompt, row[self.cfg.output_key]
        messages = as_messages(prompt, "user", where)
        if isinstance(prompt, str) or not messages:
            raise DataError(
                f"{where}: {self.cfg.input_key!r} is no list of messages, whose last one would be the answer; name "
                "the column of the answer with --output_key"
            )
        return messages[:-1], messages[-1:]

    def _closed(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self._eos] else [*ids, self._eos]
