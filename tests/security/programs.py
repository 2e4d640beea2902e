"""What the processes of the listener test run."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from openrlhf.strategy import rendezvous
from tests.security.watching import own_listeners


def listening() -> list[str]:
    """Return the addresses on which this rank listens when all have met and worked together."""
    rendezvous.join(timedelta(seconds=60))
    total = torch.ones(1)
    dist.all_reduce(total)
    found = own_listeners() if total.item() == 2 else ["the ranks did not meet"]
    dist.barrier()
    return found
