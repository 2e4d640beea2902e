"""The random state of every rank: kept in a checkpoint, and put back when a run leaves something half done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from openrlhf import device as machine
from openrlhf.errors import DataError, Preempted
from openrlhf.strategy.unpickling import load_tensors


def rng_file(folder: Path, rank: int) -> Path:
    """Return where the random state of a rank is kept; every rank writes one, so it shows who took part."""
    return folder / "rng" / f"rank{rank}.pt"


def save_rng(folder: Path, rank: int) -> None:
    """Write the state of this process's random generators to ``folder/rng/rank<rank>.pt``."""
    (folder / "rng").mkdir(parents=True, exist_ok=True)
    torch.save(machine.rng_state(), rng_file(folder, rank))


def load_rng(folder: Path, rank: int) -> None:
    """Restore what `save_rng` wrote. Raises ``DataError`` if this rank has no file."""
    path = rng_file(folder, rank)
    if not path.is_file():
        raise DataError(f"{path} is missing: the checkpoint was written by fewer ranks")
    machine.set_rng_state(load_tensors(path))


@contextmanager
def rewound_when_stopped() -> Iterator[None]:
    """Put the random generators back when the block is left because the run was asked to stop.

    The run that goes on does the block again, from the random numbers that it began with.
    """
    before = machine.rng_state()
    try:
        yield
    except (Preempted, KeyboardInterrupt):
        machine.set_rng_state(before)
        raise
