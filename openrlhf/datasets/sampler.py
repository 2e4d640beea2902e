"""Which rows each optimizer step learns from, and how ranks and micro-batches share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        lengths: tokens of each row; rows of a step are then dealt longest first, which puts like lengths into one
            micro-batch and gives the ranks equal work. A step's rows stay the same.

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
    ):
        if n_rows < 1:
            raise DataError("there are no rows to train on or to evaluate")
        if min(train_batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch {train_batch_size}, micro-batch {micro_batch_size}, rank {rank} of {world_size}")
        if lengths is not None and len(lengths) != n_rows:
            raise ValueError(f"{len(lengths)} lengths for {n_rows} rows")
        self.n_rows = n_rows
        self.train_batch_size = train_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.lengths = lengths

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
        return rows if lengths is None else sorted(rows, key=lambda row: -lengths[row])

    def _share(self, rows: list[int]) -> list[list[int]]:
        size = self.micro_batch_size
        mine = rows[self.rank :: self.world_size]
        largest_share = -(-len(rows) // self.world_size)
        return [mine[start : start + size] for start in range(0, largest_share, size)]
