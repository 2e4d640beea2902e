"""What the processes of the listener test run."""

from __future__ import annotations

from tests.security.watching import own_listeners
from tests.strategy.programs import strategy_of


def listening() -> list[str]:
    """Return the addresses on which this rank listens when all have met and worked together."""
    strategy = strategy_of(zero_stage=0)
    strategy.comm.all_reduce(1.0)
    strategy.comm.barrier("everyone listens")
    found = own_listeners()
    strategy.comm.barrier("everyone has looked")
    return found
