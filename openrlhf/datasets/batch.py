"""Batches of token sequences, padded on the right. One alignment for every mask of the project.

``B`` sequences, ``S`` padded length, ``T = S - 1``. Column ``t`` of a ``(B, T)`` tensor speaks of predicting
``sequences[:, t + 1]`` from ``sequences[:, : t + 1]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from typing_extensions import Self


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ``(sequences (B, S) int64, attention_mask (B, S) bool)`` of ``rows`` padded on the right
    to the longest.
    """
    width = max(len(row) for row in rows)
    sequences = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        sequences[index, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        attention_mask[index, : len(row)] = True
    return sequences, attention_mask


@dataclass
class TokenBatch:
    """Sequences to learn from.

    Attributes:
        sequences: ``(B, S)`` int64 token ids.
        attention_mask: ``(B, S)`` bool, true on real tokens.
        loss_mask: ``(B, T)`` bool, true where the predicted token is trained.
    """

    sequences: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    def to(self, device) -> Self:
        """Return the batch with every tensor on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
        )


@dataclass
class PreferenceBatch(TokenBatch):
    """Pairs: rows ``[0, B)`` are the chosen answers, rows ``[B, 2B)`` the rejected ones, in the same order.

    Attributes:
        margin: ``(B,)`` float, how much better the chosen answer is said to be; 0 when the data has no margin.
    """

    margin: Tensor


@dataclass
class UnpairedBatch(TokenBatch):
    """Answers that stand alone.

    Attributes:
        desirable: ``(B,)`` bool, whether the answer is one to learn from.
    """

    desirable: Tensor


@dataclass
class ProcessRewardBatch(TokenBatch):
    """Answers written step by step; ``loss_mask`` is true where the token after the end of a step is predicted.

    Attributes:
        labels: ``(B, T)``, int64 token ids or float32 probabilities of the positive token; 0 off ``loss_mask``.
    """

    labels: Tensor
