"""Prompts for reinforcement learning and for generation."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openrlhf.datasets import tokens
from openrlhf.datasets.fields import as_messages, as_text, is_blank
from openrlhf.datasets.formats import PROMPTS
from openrlhf.datasets.preview import marked_text, shortened
from openrlhf.datasets.rows import TokenisedRows
from openrlhf.datasets.templates import Renderer, fill_template
from openrlhf.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """One prompt as the policy reads it.

    Attributes:
        uid: identifies the row in its data set, e.g. ``"12"``.
        text: the prompt with its template applied.
        token_ids: ``text`` tokenised, cut to the prompt length.
        label: the reference answer for reward functions; ``""`` when the data has none.
        source: name of the data source.
    """

    uid: str
    text: str
    token_ids: tuple[int, ...]
    label: str = ""
    source: str = "default"


class PromptDataset(TokenisedRows):
    """Prompts with their template applied, tokenised, and cut on the right at ``prompt_max_len``.

    The ``uid`` of a prompt is the number of its row, whatever other rows are left out.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries. A column ``datasource`` names the source of a row.
        tokenizer: a Hugging Face tokenizer.
        prompts_cfg: ``input_key``, ``input_template``, ``apply_chat_template``, ``too_long``,
            ``special_tokens_in_text``.
        prompt_max_len: tokens kept of a prompt.
        label_key: key of the reference answer, or None.
        name: what messages call the data.
        end: what every prompt ends with, after its template; it is not cut.

    Attributes:
        dropped: ``Counter`` of rows left out, by reason.
        truncated: number of prompts cut at ``prompt_max_len``.

    Raises:
        DataError: a key is missing, a value has the wrong type, no prompt is left.
    """

    FORMATS = PROMPTS
    limit_flag = "--prompt_max_len"

    def __init__(
        self,
        rows: Any,
        tokenizer: Any,
        prompts_cfg: Any,
        prompt_max_len: int,
        label_key: str | None = None,
        name: str = "the data",
        end: str = "",
    ):
        render = Renderer(
            tokenizer, prompts_cfg.input_template, prompts_cfg.apply_chat_template, prompts_cfg.special_tokens_in_text
        )
        super().__init__(tokenizer, prompts_cfg, prompt_max_len, render, name)
        self._label_key = label_key
        self._end = end
        self._end_ids = tokens.tokenize(tokenizer, [end])[0] if end else []
        self._prompts: list[tuple[int, str, array, str, str]] = []
        self._read(rows, {prompts_cfg.input_key: "--input_key"} | ({label_key: "--label_key"} if label_key else {}))

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        number, text, ids, label, source = self._prompts[index]
        return Prompt(str(number), text, tuple(ids), label, source)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def preview(self, index: int) -> list[str]:
        """Return the prompt as the policy reads it, and its label where the data has labels."""
        prompt = self[index]
        lines = [marked_text(self.tokenizer, prompt.token_ids, [False] * len(prompt.token_ids))]
        return lines + ([f"label: {shortened(prompt.label)}"] if self._label_key else [])

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        key = self.cfg.input_key
        usable = [(number, row) for number, row in batch if not is_blank(row[key])]
        self.dropped["empty prompt"] += len(batch) - len(usable)
        texts = [self._render.prompt(row[key], self._where(number)) + self._end for number, row in usable]
        for (number, row), text, ids in zip(usable, texts, tokens.tokenize(self.tokenizer, texts), strict=True):
            if not self._keeps(len(ids), number):
                continue
            label = label_text(row[self._label_key]) if self._label_key else ""
            source = str(row.get("datasource") or "default")
            self._prompts.append((number, tokens.unguarded(text), array("i", self._cut(ids)), label, source))

    def _cut(self, ids: list[int]) -> list[int]:
        """Return at most ``prompt_max_len`` tokens of ``ids``, the end that all prompts have among them."""
        if len(ids) <= self.limit:
            return ids
        kept = self.limit - len(self._end_ids)
        if kept < 1:
            raise UsageError(
                f"{self.limit_flag} {self.limit} has no room for a prompt before its end {self._end!r}: raise it "
                f"above {len(self._end_ids)}"
            )
        return ids[:kept] + self._end_ids


def label_text(value: Any) -> str:
    """Return a reference answer as text: strings as they are, None as ``""``, other values as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def preprocess_data(
    data: dict,
    input_template: str | None = None,
    input_key: str = "input",
    apply_chat_template: Callable[..., str] | None = None,
    label_key: str | None = None,
) -> str | tuple[str, str]:
    """Return the prompt text of one row, with ``label_key`` ``(prompt text, label)``. OpenRLHF's public signature.

    Args:
        data: the row.
        input_template: python format with one ``{}``, used without a chat template.
        apply_chat_template: ``tokenizer.apply_chat_template``.
    """
    value = data[input_key]
    if apply_chat_template:
        messages = as_messages(value, "user", "the row")
        prompt = apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = as_text(value, "the row")
        prompt = fill_template(input_template, text) if input_template else text
    return (prompt, label_text(data[label_key])) if label_key else prompt
