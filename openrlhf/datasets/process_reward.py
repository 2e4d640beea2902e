"""Answers written step by step with a label for every step, for process reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openrlhf.datasets import tokens
from openrlhf.datasets.batch import ProcessRewardBatch, pad_rows
from openrlhf.datasets.fields import as_messages
from openrlhf.datasets.formats import STEP_END, STEPWISE, stepwise_text
from openrlhf.datasets.preview import marked_text
from openrlhf.datasets.rows import TokenisedRows
from openrlhf.datasets.store import as_floats, as_ints
from openrlhf.datasets.templates import Renderer
from openrlhf.errors import DataError, UsageError


@dataclass(frozen=True)
class ProcessRewardRow:
    """One answer.

    Attributes:
        token_ids: ``L`` ids; the last is eos.
        places: where the placeholders stand in it, none at the end.
        labels: of the steps that end there: token ids (int) or probabilities of the positive token (float).
    """

    token_ids: list[int]
    places: list[int]
    labels: list[int] | list[float]


class ProcessRewardDataset(TokenisedRows):
    """Tokenised answers that hold a placeholder after every step. What is cut at ``max_len`` loses its labels.

    A label is a token, or a number: the probability that the step is right, of which ``reward_tokens`` names the
    tokens for right and wrong. With ``steps_key`` the steps are a list, and the placeholders are put after them;
    without it they are found in the text, with or without a space before them, which often is another token.

    Args:
        rows: a ``datasets.Dataset`` or a list of dictionaries.
        tokenizer: a Hugging Face tokenizer.
        data_cfg: ``max_len``, ``input_key``, ``steps_key`` (or None), ``label_key``, ``placeholder_token``,
            ``reward_tokens`` (or None), ``input_template``, ``apply_chat_template``, ``too_long``,
            ``special_tokens_in_text`` (None is the token).
        name: what messages call the data.
        cache: file to keep the tokenised rows in, and to take them from; without it they stay in memory.

    Attributes:
        dropped: ``Counter`` of rows left out, by reason.
        truncated: number of rows cut at ``max_len``.
        lengths: tokens of each row.
        reward_ids: ids of the reward tokens, or None.

    Raises:
        UsageError: a placeholder or reward token is not one token; numbers as labels without two reward tokens.
        DataError: a key is missing, a value has the wrong type, a label is no reward token, a row has not one
            label for every placeholder, no row is left.
    """

    FORMATS = STEPWISE
    PARTS = 3
    """Token ids, the places, and the labels: ids, or the two halves of each probability."""
    COUNTED = ("truncated", "_kind")
    marks = "the ends of steps"

    def __init__(self, rows: Any, tokenizer: Any, data_cfg: Any, name: str = "the data", cache: Path | None = None):
        render = Renderer(
            tokenizer,
            data_cfg.input_template,
            data_cfg.apply_chat_template,
            data_cfg.special_tokens_in_text or "token",
        )
        super().__init__(tokenizer, data_cfg, data_cfg.max_len, render, name)
        self._eos = tokens.eos_of(tokenizer)
        self._spellings = spellings(tokenizer, data_cfg.placeholder_token, "--placeholder_token")
        named = data_cfg.reward_tokens
        self.reward_ids = named and [single_token(tokenizer, token, "--reward_tokens") for token in named]
        self._kind: str | None = None
        """Of the labels: "token" or "number"; None before the first."""
        required = {data_cfg.input_key: "--input_key", data_cfg.label_key: "--label_key"}
        if data_cfg.steps_key:
            required[data_cfg.steps_key] = "--steps_key"
        self._read(rows, required, cache)

    def __getitem__(self, index: int) -> ProcessRewardRow:
        ids, places, labels = self._rows[index]
        labels = as_floats(labels) if self._kind == "number" else labels
        return ProcessRewardRow(ids.tolist(), places.tolist(), labels.tolist())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self._rows.lengths(0)

    def collate(self, rows: Sequence[ProcessRewardRow]) -> ProcessRewardBatch:
        """Return the rows padded on the right; no rows give one dummy row that trains nothing."""
        rows = rows or [ProcessRewardRow([self._eos] * 2, [], [])]
        sequences, attention_mask = pad_rows([row.token_ids for row in rows], self.pad_id)
        loss_mask = torch.zeros(len(rows), sequences.shape[1] - 1, dtype=torch.bool)
        labels = torch.zeros_like(loss_mask, dtype=torch.float32 if self._kind == "number" else torch.int64)
        for index, row in enumerate(rows):
            loss_mask[index, row.places] = True
            labels[index, row.places] = torch.tensor(row.labels, dtype=labels.dtype)
        return ProcessRewardBatch(sequences, attention_mask, loss_mask, labels)

    def preview(self, index: int) -> list[str]:
        """Return two lines: a row with the ends of its steps marked, and their labels."""
        row = self[index]
        marks = [place in set(row.places) for place in range(len(row.token_ids))]
        shown = row.labels if self._kind == "number" else [self.tokenizer.decode([label]) for label in row.labels]
        return [marked_text(self.tokenizer, row.token_ids, marks), f"labels: {' '.join(map(str, shown))}"]

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        texts = [self._pieces(row, self._where(number)) for number, row in batch]
        encoded = tokens.tokenize_pieces(self.tokenizer, texts)
        for (number, row), pieces in zip(batch, encoded, strict=True):
            labels = self._labels(row[self.cfg.label_key], number)
            ids = [token for piece in pieces for token in piece]
            find = self._ends if self.cfg.steps_key else self._found
            self._store(ids, find(pieces, len(labels), self._where(number)), labels, number)

    def _pieces(self, row: dict, where: str) -> list[str]:
        """Return the text of a row; where the steps are a list, cut behind every placeholder."""
        value, cfg = row[self.cfg.input_key], self.cfg
        if cfg.steps_key:
            steps = stepwise_text(row[cfg.steps_key], row[cfg.label_key], where)
            prompt, answer = self._render.pair(value, steps, where)
            *ended, rest = (prompt + answer if cfg.apply_chat_template else f"{prompt}\n{answer}").split(STEP_END)
            return [*(f"{step}{cfg.placeholder_token}" for step in ended), rest]
        if cfg.apply_chat_template:
            return [self._render.conversation(as_messages(value, "user", where), where).rstrip("\n")]
        return [self._render.prompt(value, where)]

    def _ends(self, pieces: list[list[int]], count: int, where: str) -> list[int]:
        """Return where the placeholders stand that were put behind steps: at the end of all pieces but the last."""
        *steps, _ = pieces
        if len(steps) != count:
            raise DataError(f"{where}: the chat template shows {len(steps)} of {count} steps; give another template")
        for step in steps:
            if not any(step[-1] in spelling for spelling in self._spellings):
                raise self._not_found(step, f"{where}: a step does not end with --placeholder_token")
        return [place - 1 for place in accumulate(map(len, steps))]

    def _found(self, pieces: list[list[int]], count: int, where: str) -> list[int]:
        """Return where the placeholders stand in a text that holds them: the same token in all rows, the one that
        agrees with the labels of the first.
        """
        (ids,) = pieces
        found = [[place for place, token in enumerate(ids) if token in spelling] for spelling in self._spellings]
        if not any(found) and not count:
            return []
        for spelling, places in zip(self._spellings, found, strict=True):
            if places and len(places) == count:
                self._spellings = [spelling]
                return places
        most = max(map(len, found))
        raise self._not_found(ids, f"{where}: {count} labels and {most} placeholders; give one label a step")

    def _not_found(self, ids: list[int], what: str) -> DataError:
        """Return an error that says which tokens were looked for, and as which ``ids`` spell the placeholder."""
        decode, text = self.tokenizer.decode, self.cfg.placeholder_token
        sought = " or ".join(repr(decode([token])) for spelling in self._spellings for token in sorted(spelling))
        end = next((end for end in range(1, len(ids) + 1) if text in decode(ids[:end])), 0)
        start = next((start for start in reversed(range(end)) if text in decode(ids[start:end])), 0)
        there = ", ".join(repr(decode([token])) for token in ids[start:end])
        spelt = (
            f"the text has {text!r} {decode(ids).count(text)} times, first as {there}" if end else "not in the text"
        )
        return DataError(
            f"{what} (looked for the token {sought}; {spelt}): mend the row, or take another --placeholder_token"
        )

    def _store(self, ids: list[int], places: list[int], labels: list[int] | list[float], number: int) -> None:
        """Close the row with an eos, so that the last placeholder has a token after it, and cut it."""
        if ids[-1:] != [self._eos] or places[-1:] == [len(ids) - 1]:
            ids = [*ids, self._eos]
        kept = [place for place in places if place < self.limit - 1]
        if not kept and (not places or self.cfg.too_long == "cut"):
            self.dropped["no placeholder" if not places else f"no placeholder within --max_len {self.limit}"] += 1
            return
        if self._keeps(len(ids), number):
            ids = ids if len(ids) <= self.limit else [*ids[: self.limit - 1], self._eos]
            labels = labels[: len(kept)]
            self._writer.add(ids, kept, as_ints(labels) if self._kind == "number" else labels)

    def _labels(self, value: Any, number: int) -> list[int] | list[float]:
        """Return the labels of a row as token ids, or as probabilities."""
        where = f"{self._where(number)}: {self.cfg.label_key!r} (--label_key)"
        if not isinstance(value, (list, tuple)):
            raise DataError(f"{where} is a list with a label for every step; found {type(value).__name__}")
        kind = "token" if all(isinstance(label, str) for label in value) else "number"
        if value and self._kind not in (None, kind):
            raise DataError(f"{where}: some rows have tokens for labels and some have numbers; give one kind")
        self._kind = kind if value else self._kind
        return [self._token(label, where) if kind == "token" else self._probability(label, where) for label in value]

    def _token(self, label: str, where: str) -> int:
        try:
            token = single_token(self.tokenizer, label, where)
        except UsageError as error:
            raise DataError(str(error)) from error
        if self.reward_ids and token not in self.reward_ids:
            raise DataError(f"{where}: the label {label!r} is not one of --reward_tokens; name it there")
        return token

    def _probability(self, label: Any, where: str) -> float:
        if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:
            raise DataError(f"{where}: a label is a token, true or false, or a number from 0 to 1; found {label!r}")
        if len(self.reward_ids or ()) != 2:
            raise UsageError(f"{where} holds numbers: name two --reward_tokens, for a right and for a wrong step")
        return float(label)


def single_token(tokenizer: Any, text: str, flag: str) -> int:
    """Return the id of the one token that ``text`` is; raise :class:`UsageError` when it is none or several."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UsageError(f"{flag}: {text!r} is {len(ids)} tokens of this tokenizer; give one that is a single token")
    return ids[0]


def spellings(tokenizer: Any, text: str, flag: str) -> list[frozenset[int]]:
    """Return the ids that are ``text`` in a sentence: those without, then those with a space before it, if any.

    In each set are the token itself and those that hold line breaks behind it too: vocabularies have such for signs.
    Raises :class:`UsageError` where ``text`` itself is not one token.
    """
    single_token(tokenizer, text, flag)
    found = []
    for space in ("", " "):
        tries = [tokenizer.encode(f"{space}{text}{rest}", add_special_tokens=False) for rest in ("", "\n", "\n\n")]
        found.append(frozenset(ids[0] for ids in tries if len(ids) == 1))
    return [ids for ids in found if ids]
