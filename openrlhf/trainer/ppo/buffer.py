"""The experiences of one rollout on one rank, dealt into optimizer steps and micro-batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.sampler import cut_by_tokens
from openrlhf.rollout.types import Experience, SequenceBatch
from openrlhf.strategy.comm import Comm

Batch = TypeVar("Batch", bound=SequenceBatch)


def concatenate(batches: list[Batch]) -> Batch:
    """Return the rows of all ``batches`` as one batch, padded on the right with zeros to the widest."""
    width = max(batch.sequences.shape[1] for batch in batches)
    columns = {}
    for f in fields(batches[0]):
        parts = [getattr(batch, f.name) for batch in batches]
        if parts[0].dim() == 2:
            target = width if f.name in ("sequences", "attention_mask") else width - 1
            parts = [torch.nn.functional.pad(part, (0, target - part.shape[1])) for part in parts]
        columns[f.name] = torch.cat(parts)
    return type(batches[0])(**columns)


def blank_sequences() -> SequenceBatch:
    """Return one row of two tokens without any action: what a rank computes on when it has no rows of its own."""
    return SequenceBatch(
        sequences=torch.zeros(1, 2, dtype=torch.int64),
        attention_mask=torch.ones(1, 2, dtype=torch.bool),
        action_mask=torch.zeros(1, 1, dtype=torch.bool),
        rollout_log_probs=torch.zeros(1, 1),
        sample=torch.full((1,), -1),
    )


def blank_experience() -> Experience:
    """Return :func:`blank_sequences` with zeros for everything that is learned from."""
    names = ("log_probs", "ref_log_probs", "kl", "values", "advantages", "returns")
    zeros: dict[str, Tensor] = {name: torch.zeros(1, 1) for name in names}
    return Experience(**vars(blank_sequences()), scores=torch.zeros(1), **zeros)


def shuffle_seed(run_seed: int, rollout: int, epoch: int) -> int:
    """Return the seed that shuffles the rows of ``rollout`` in pass ``epoch`` over it."""
    return int.from_bytes(hashlib.sha256(f"shuffle/{run_seed}/{rollout}/{epoch}".encode()).digest()[:4], "big")


def cut(batch: SequenceBatch, rows: list[int], most_rows: int, most_tokens: int | None) -> list[list[int]]:
    """Return ``rows`` of ``batch`` in micro-batches: of ``most_rows`` each, or of ``most_tokens`` where that is given.

    By tokens the largest comes first, so that ranks work on like ones together; a longer row is alone.
    """
    if most_tokens is None:
        return [rows[start : start + most_rows] for start in range(0, len(rows), most_rows)]
    lengths = batch.attention_mask.sum(dim=1).tolist()
    longest_first = sorted(rows, key=lambda row: -lengths[row])
    return cut_by_tokens({row: lengths[row] for row in longest_first}, most_tokens)


class ExperienceBuffer:
    """Experiences of one rank, and how they are dealt.

    A pass has ``ceil(rows of all ranks / train_batch_size)`` optimizer steps. Every rank deals its own rows evenly
    over them, so each row is seen once a pass. All ranks see the same number of micro-batches in a step; one that runs
    out gets micro-batches without actions, which weigh nothing.

    Args:
        experiences: shards of this rank; they may be empty.
        comm: the ranks of the role.
        batch: ``train_batch_size`` rows of one optimizer step over all ranks, ``micro_train_batch_size`` rows or
            ``max_tokens_per_gpu`` tokens of one forward on one rank, and the run's ``seed``.
        rollout: number of the rollout, which together with the seed fixes the order.
        ring: so many neighbouring ranks have the same shards, and are one here.
    """

    def __init__(self, experiences: list[Experience], comm: Comm, batch: BatchConfig, rollout: int, ring: int = 1):
        self.data = concatenate(experiences) if any(len(part) for part in experiences) else None
        self.comm, self._ring = comm, ring
        budget = batch.max_tokens_per_gpu
        self.micro_batch_size, self.max_tokens = batch.micro_train_batch_size, budget and budget * ring
        self.seed = batch.seed
        self.rollout = rollout
        self.rows = len(self.data) if self.data is not None else 0
        rows = round(comm.all_reduce(float(self.rows))) // ring
        self.steps = max(1, math.ceil(rows / batch.train_batch_size))

    def epoch(self, number: int) -> Iterator[list[Experience]]:
        """Yield the micro-batches of each optimizer step of pass ``number``."""
        generator = torch.Generator().manual_seed(shuffle_seed(self.seed, self.rollout, number))
        order = torch.randperm(self.rows, generator=generator).tolist()
        for step in range(self.steps):
            turn = (step + self.comm.rank // self._ring) % self.steps
            yield self._micro_batches(order[turn * self.rows // self.steps : (turn + 1) * self.rows // self.steps])

    def _micro_batches(self, rows: list[int]) -> list[Experience]:
        chunks = cut(self.data, rows, self.micro_batch_size, self.max_tokens) if rows else []
        count = round(self.comm.all_reduce(float(len(chunks)), op="max"))
        return [self.data.select(chunk) for chunk in chunks] + [self._weightless()] * (count - len(chunks))

    def _weightless(self) -> Experience:
        if self.data is None:
            return blank_experience()
        row = self.data.select([0])
        return replace(row, action_mask=torch.zeros_like(row.action_mask), sample=torch.full((1,), -1))
