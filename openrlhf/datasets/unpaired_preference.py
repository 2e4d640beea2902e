"""Answers that are each said to be desirable or not, for KTO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openrlhf.config.checks import NO_ANSWER
from openrlhf.datasets.batch import UnpairedBatch
from openrlhf.datasets.formats import UNPAIRED
from openrlhf.datasets.sft import SFTDataset, SFTRow
from openrlhf.errors import DataError

DESIRABLE, UNDESIRABLE = ("1", "1.0", "true"), ("0", "0.0", "false")
"""How labels are spelled; in a table they are text."""


@dataclass(frozen=True)
class UnpairedRow(SFTRow):
    """One answer.

    Attributes:
        desirable: whether it is one to learn from.
    """

    desirable: bool


class UnpairedPreferenceDataset(SFTDataset):
    """Tokenised answers with a label. A row is made, cut and left out as a demonstration is.

    Args:
        data_cfg: what :class:`SFTDataset` reads, and ``label_key``.

    Raises:
        DataError: a key is missing, a value has the wrong type, a label is neither true nor false, no row is left.
    """

    FORMATS = UNPAIRED
    PARTS = 3
    """Token ids, the first and last position of the answer, and the label."""
    marks = "the answer"
    no_answer = NO_ANSWER

    def __init__(self, rows: Any, tokenizer: Any, data_cfg: Any, name: str = "the data", cache: Path | None = None):
        self._label_of: dict[int, bool] = {}
        super().__init__(rows, tokenizer, data_cfg, name, cache)

    def __getitem__(self, index: int) -> UnpairedRow:
        row = super().__getitem__(index)
        return UnpairedRow(row.token_ids, row.loss_mask, row.tokenizer, self._desirable(index))

    def mismatched(self, prompt: int, answer: int) -> UnpairedRow:
        """Return the prompt of one row with the answer of another, cut at ``max_len``."""
        (asked, span, _), (said, donor, _) = self._rows[prompt], self._rows[answer]
        start = int(span[0])
        ids = [*asked[:start].tolist(), *said[donor[0] :].tolist()][: self.limit]
        return UnpairedRow(ids, [t >= start for t in range(1, len(ids))], self.tokenizer, False)

    def mismatched_length(self, prompt: int, answer: int) -> int:
        """Return the tokens of that row."""
        said, donor, _ = self._rows[answer]
        return min(int(self._rows[prompt][1][0]) + len(said) - int(donor[0]), self.limit)

    def collate(self, rows: Sequence[UnpairedRow]) -> UnpairedBatch:
        """Return the rows padded on the right; no rows give one dummy row that trains nothing."""
        batch = super().collate(rows)
        labels = [row.desirable for row in rows] or [False]
        return UnpairedBatch(batch.sequences, batch.attention_mask, batch.loss_mask, torch.tensor(labels))

    def preview(self, index: int) -> list[str]:
        """Return one line that shows a row with its label and the answer marked."""
        (line,) = super().preview(index)
        return [f"{'desirable  ' if self._desirable(index) else 'undesirable'} {line}"]

    def _required(self) -> dict[str, str]:
        return super()._required() | {self.cfg.label_key: "--label_key"}

    def _add(self, batch: list[tuple[int, dict]]) -> None:
        self._label_of = {number: self._label(row[self.cfg.label_key], number) for number, row in batch}
        super()._add(batch)

    def _beside(self, number: int) -> list[list[int]]:
        return [[int(self._label_of[number])]]

    def _desirable(self, index: int) -> bool:
        return bool(self._rows[index][2][0])

    def _label(self, value: Any, number: int) -> bool:
        words = str(value).strip().lower()
        if words not in DESIRABLE + UNDESIRABLE:
            raise DataError(
                f"{self._where(number)}: {self.cfg.label_key!r} (--label_key) is {value!r}; it is true or 1 for a "
                "desirable answer, false or 0 for another"
            )
        return words in DESIRABLE
