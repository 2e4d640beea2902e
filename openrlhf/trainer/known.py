"""What a model that never learns said of answers: looked up instead of asked, and kept in the run folder.

A kept file is used only for the same model, settings and rows; any other is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.batch import TokenBatch
from openrlhf.datasets.cache import kept_rows
from openrlhf.datasets.store import RowStore, RowWriter, open_rows
from openrlhf.strategy.comm import Comm
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.sampling import in_order

Reference = Callable[[TokenBatch], Tensor]
"""The log-prob ``(B,)`` of each answer of a batch under a model that never learns."""
KEY = np.dtype("S16")
PARTS = 2
"""A file is one row: the keys, and the log-probs."""


@dataclass(frozen=True, eq=False)
class KnownAnswers:
    """What a model said of answers, found again by their tokens. It is a :data:`Reference`.

    Attributes:
        keys: ``(N,)`` ascending, each once: what :func:`answer_keys` returns.
        log_probs: ``(N,)`` float32.
    """

    keys: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> KnownAnswers:
        """Return what pairs of keys and log-probs say together, in any order; the first of equal keys counts."""
        columns = zip((np.empty(0, KEY), np.empty(0, np.float32)), *parts, strict=True)
        keys, log_probs = (np.concatenate(column) for column in columns)
        keys, first = np.unique(keys, return_index=True)
        return cls(keys, log_probs[first])

    def __len__(self) -> int:
        return len(self.keys)

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return the log-probs ``(B,)`` float32; a row without marked tokens has 0.

        Raises ``KeyError`` for an answer that the model was not asked about.
        """
        marked, keys = batch.loss_mask.any(dim=1).cpu().numpy(), answer_keys(batch)
        said = np.zeros(len(keys), np.float32)
        places = np.searchsorted(self.keys, keys)
        for row in np.flatnonzero(marked):
            place = places[row]
            if place == len(self) or self.keys[place] != keys[row]:
                raise KeyError(f"row {row} of a batch: the model was not asked about this answer")
            said[row] = self.log_probs[place]
        return torch.from_numpy(said).to(batch.sequences.device)


def ask_about(sets: Iterable[Any], ask: Reference, batch: BatchConfig, strategy: DeepSpeedStrategy) -> KnownAnswers:
    """Ask about every row of some data sets, each rank about its share, and return the answers of all ranks."""
    parts = []
    for data in sets:
        for step in in_order(data, len(data), batch, strategy).epoch(0):
            for rows in step:
                asked = data.collate([data[row] for row in rows])
                said = ask(asked.to(strategy.device))
                if rows:
                    parts.append((answer_keys(asked), said.float().cpu().numpy()))
    mine = KnownAnswers.of(parts)
    return KnownAnswers.of(strategy.comm.all_gather_object((mine.keys, mine.log_probs)))


def kept_answers(path: Path, key: str, comm: Comm, make: Callable[[], KnownAnswers]) -> tuple[KnownAnswers, bool]:
    """Return the answers that ``path`` holds for ``key``, mapped into memory, and whether they were there.

    Where a rank does not find them, all ``make`` them together. Raises ``InfraError`` when they cannot be written.
    """
    found = open_rows(path, PARTS)
    rows = found[0] if found and found[1].get("key") == key else None
    were_there = not comm.all_reduce(float(rows is None), "max")
    if not were_there:
        made = make()
        rows, _ = kept_rows(path, key, PARTS, lambda writer: _write(made, writer))
    return _read(rows), were_there


def _write(answers: KnownAnswers, writer: RowWriter) -> dict[str, Any]:
    writer.add(answers.keys.view(np.int32), answers.log_probs.view(np.int32))
    return {}


def _read(rows: RowStore) -> KnownAnswers:
    keys, log_probs = rows[0]
    return KnownAnswers(keys.view(KEY), log_probs.view(np.float32))


def answer_keys(batch: TokenBatch) -> np.ndarray:
    """Return what tells each row ``(B,)`` of a batch from others: a hash of its tokens and of which are marked."""
    rows = zip(batch.sequences.cpu(), batch.attention_mask.cpu(), batch.loss_mask.cpu(), strict=True)
    return np.array([_key(tokens[real], marked[real[1:]]) for tokens, real, marked in rows], KEY)


def _key(tokens: Tensor, marked: Tensor) -> bytes:
    return blake2b(tokens.numpy().tobytes() + marked.numpy().tobytes(), digest_size=KEY.itemsize).digest()
