"""The prompts of some rows with the answers of others, on which KTO measures how far the policy has drifted."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.datasets.sampler import StepSampler
from openrlhf.errors import DataError


def partners(rows: Sequence[int], n_rows: int) -> np.ndarray:
    """Return ``(N, 2)``: each row of a step, or of an evaluation, in their order, and the one that lends its answer.

    That is the next of the same step, after the last the first. Rows may be named more than once, as the ranks of a
    ring do. A step of one row borrows from the next of the ``n_rows`` of the data: with its own answer the row would
    not be mismatched.

    Raises:
        DataError: the data has no second row.
    """
    if n_rows < 2:
        raise DataError("KTO measures the drift of the policy on a prompt with the answer to another: give two rows")
    ordered = np.unique(np.asarray(rows, np.int64))
    lenders = np.roll(ordered, -1) if len(ordered) > 1 else (ordered + 1) % n_rows
    return np.stack([ordered, lenders], axis=1)


class Mismatched:
    """A data set of mismatched rows: the prompt of one row of ``data`` with the answer of another.

    ``pairs`` ``(N, 2)`` holds the numbers of both, in ascending order.
    """

    def __init__(self, data: Any, pairs: np.ndarray):
        self._data, self._pairs = data, pairs
        self.collate = data.collate

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Any:
        return self._data.mismatched(*self._pairs[index].tolist())

    def of(self, row: int) -> Any:
        """Return the first that has the prompt of ``row``."""
        return self[int(np.searchsorted(self._pairs[:, 0], row))]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        found = (self._data.mismatched_length(*pair) for pair in self._pairs.tolist())
        return np.fromiter(found, np.int64, len(self))

    @property
    def digest(self) -> str:
        """Changes with any row, and with their order and number."""
        return sha256(fingerprint(self._data).encode() + self._pairs.tobytes()).hexdigest()


def mismatched_sets(train: Any, evaluation: Any, batch: BatchConfig) -> list[Mismatched]:
    """Return the mismatched rows of all steps of a run, and of its evaluations."""
    sampler = StepSampler(len(train), batch.train_batch_size, batch.train_batch_size, batch.seed)
    steps = (step[0] for epoch in range(batch.max_epochs) for step in sampler.epoch(epoch))
    found = [Mismatched(train, np.unique(np.concatenate([partners(step, len(train)) for step in steps]), axis=0))]
    if len(evaluation):
        found.append(Mismatched(evaluation, partners(range(len(evaluation)), len(evaluation))))
    return found
