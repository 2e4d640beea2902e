"""The random state of every rank, kept in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from openrlhf import device as machine
from openrlhf.errors import DataError
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
