"""Which rows each optimizer step learns from, and how ranks and micro-batches share them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from openrlhf.errors import DataError


class StepSampler:
    """Deals the rows of an epoch to optimizer steps, then to ranks, then to micro-batches.

    The rows of a step depend on ``(seed, epoch, step)`` alone, so that a run may go on with another number of ranks
    or another micro-batch size. The last step of an epoch is short when the rows do not divide.

    Args:
        n_rows: rows of the data set.
        train_batch_size: rows of an optimizer step over all ranks.
        micro_batch_size: rows of one forward on one rank.
        seed: with the epoch it fixes the permutation.
        rank: this data-parallel rank.
        world_size: number of data-parallel ranks.
        shuffle: False keeps the order of the data (evaluation).
        lengths: tokens of each row; the micro-batches of a step then have like many tokens, over all ranks. A step's
            rows stay the same.
        max_tokens: with ``lengths``: no micro-batch has more tokens, unless it is one longer row; there are about as
            few as that takes, and ``micro_batch_size`` counts no more.

    Raises:
        DataError: there are no rows.
    """

    def __init__(
        self,
        n_rows: int,
        train_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        lengths: Sequence[int] | None = None,
        max_tokens: int | None = None,
    ):
        if n_rows < 1:
            raise DataError("there are no rows to train on or to evaluate")
        if min(train_batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch {train_batch_size}, micro-batch {micro_batch_size}, rank {rank} of {world_size}")
        if lengths is not None and len(lengths) != n_rows:
            raise ValueError(f"{len(lengths)} lengths for {n_rows} rows")
        if max_tokens is not None and lengths is None:
            raise ValueError("rows cannot be cut by tokens without their lengths")
        self.n_rows = n_rows
        self.train_batch_size = train_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.lengths = lengths
        self.max_tokens = max_tokens

    @property
    def steps_per_epoch(self) -> int:
        """``ceil(n_rows / train_batch_size)``."""
        return -(-self.n_rows // self.train_batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[list[int]]]:
        """Yield the micro-batches of this rank for every step of ``epoch`` from ``start_step`` on.

        Each step is a list of lists of row numbers; all ranks get the same number of lists. A rank with fewer rows
        gets empty lists: micro-batches of weight zero.
        """
        order = self._order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            yield self._share(self._step_rows(order, step))

    def step_rows(self, epoch: int, step: int) -> list[int]:
        """Return the rows of one step over all ranks, in the order in which they are dealt."""
        return self._step_rows(self._order(epoch), step)

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.n_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)

    def _step_rows(self, order: np.ndarray, step: int) -> list[int]:
        rows = order[step * self.train_batch_size : (step + 1) * self.train_batch_size].tolist()
        lengths = self.lengths
        return rows if lengths is None else sorted(rows, key=lambda row: -int(lengths[row]))

    def _share(self, rows: list[int]) -> list[list[int]]:
        if self.lengths is not None:
            # The largest first: what does not fit into memory shows at once, and ranks work on like ones together.
            return self._balanced(rows, self.lengths)[self.rank :: self.world_size]
        size = self.micro_batch_size
        mine = rows[self.rank :: self.world_size]
        largest_share = -(-len(rows) // self.world_size)
        return [mine[start : start + size] for start in range(0, largest_share, size)]

    def _balanced(self, rows: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """Return the micro-batches of a step over all ranks, equally many for each, the largest first."""
        tokens = {row: int(lengths[row]) for row in rows}
        if self.max_tokens is not None:
            return cut_by_tokens(tokens, self.max_tokens, self.world_size)
        share = -(-len(rows) // self.world_size)
        return deal_evenly(tokens, -(-share // self.micro_batch_size) * self.world_size, self.micro_batch_size)


def cut_by_tokens(tokens: Mapping[int, int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Return the rows of ``tokens``, which maps them to their lengths, in lists of like many tokens.

    No list has more than ``budget`` tokens unless it is one longer row. There are about as few as that takes, in a
    multiple of ``multiple``, and the one with the most tokens comes first. The longest row should come first.
    """
    least = sum(min(length, budget) for length in tokens.values())
    parts = -(-least // (budget * multiple)) * multiple
    while True:
        dealt = deal_evenly(tokens, parts, len(tokens))
        if all(len(part) < 2 or sum(tokens[row] for row in part) <= budget for part in dealt):
            return dealt
        parts += multiple


def deal_evenly(tokens: Mapping[int, int], parts: int, most_rows: int) -> list[list[int]]:
    """Return the rows of ``tokens``, which maps them to their lengths, in ``parts`` lists of like many tokens.

    The list with the most tokens comes first; none has more than ``most_rows`` rows. Each row in its turn goes to the
    list with the fewest tokens so far. With the longest row first, and without ``most_rows``, the largest list is at
    most 4/3 of what the best way to deal makes it (Graham 1969).
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    open_parts = [(0, part) for part in range(parts)]
    for row, length in tokens.items():
        _, part = heapq.heappop(open_parts)
        dealt[part].append(row)
        sums[part] += length
        if len(dealt[part]) < most_rows:
            heapq.heappush(open_parts, (sums[part], part))
    return [dealt[part] for part in sorted(range(parts), key=lambda part: -sums[part])]
