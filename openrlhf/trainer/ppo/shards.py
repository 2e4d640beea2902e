"""How the rollouts of a step are dealt into shards, and how what workers say of shards comes back into their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from openrlhf.datasets.sampler import deal_evenly
from openrlhf.rollout.types import Rollout, SequenceBatch
from openrlhf.trainer.ppo.buffer import blank_sequences
from openrlhf.trainer.ppo.groups import deal

Row = TypeVar("Row")


def shard(rollouts: Sequence[Rollout], parts: int, pad_id: int, by_tokens: bool = False) -> list[SequenceBatch]:
    """Return the rollouts as ``parts`` batches, each padded to its own longest; some may have no rows.

    ``sample`` of a batch says which rollouts it has: consecutive ones, or with ``by_tokens`` those that give all
    batches like many tokens.
    """
    if by_tokens:
        lengths = {sample: len(rollout.token_ids) for sample, rollout in enumerate(rollouts)}
        longest_first = dict(sorted(lengths.items(), key=lambda item: -item[1]))
        dealt = [sorted(part) for part in deal_evenly(longest_first, parts, math.ceil(len(rollouts) / parts))]
    else:
        dealt = deal(range(len(rollouts)), parts)
    return [_batch_of(rollouts, samples, pad_id) for samples in dealt]


def _batch_of(rollouts: Sequence[Rollout], samples: Sequence[int], pad_id: int) -> SequenceBatch:
    if not samples:
        return blank_sequences().select([])
    batch = SequenceBatch.from_rollouts([rollouts[sample] for sample in samples], pad_id)
    return replace(batch, sample=torch.tensor(samples))


def split_like(shards: list[SequenceBatch], column: Tensor) -> list[Tensor]:
    """Return the entries of ``column`` ``(N,)`` that belong to the rollouts of each shard."""
    return [column[part.sample] for part in shards]


def joined(shards: list[SequenceBatch], columns: list[Tensor]) -> Tensor:
    """Return ``(N,)`` in the order of the rollouts, of which ``columns`` holds what belongs to each shard."""
    # A shard without rows has no scores, of whatever shape.
    return torch.cat([column.flatten() for column in columns])[torch.cat([part.sample for part in shards]).argsort()]


def rows_split_like(shards: list[SequenceBatch], rows: Sequence[Row]) -> list[list[Row]]:
    """Return what of ``rows`` belongs to each shard, as :func:`split_like` does."""
    return [[rows[sample] for sample in part.sample] for part in shards]


def rows_joined(shards: list[SequenceBatch], columns: list[list[Row]]) -> list[Row]:
    """Return the rows in the order of the rollouts, as :func:`joined` does."""
    numbered = {
        sample: row
        for part, rows in zip(shards, columns, strict=True)
        for sample, row in zip(part.sample.tolist(), rows, strict=True)
    }
    return [numbered[sample] for sample in range(len(numbered))]
