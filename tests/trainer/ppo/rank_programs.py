"""What the ranks of the tests of one program run; every function is called by all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openrlhf.errors import DataError, Preempted
from openrlhf.rollout.reward_source import RewardFunction
from openrlhf.strategy import signals
from openrlhf.strategy.comm import Comm
from openrlhf.trainer.ppo.groups import LocalGroup
from openrlhf.trainer.ppo.together import score_together
from tests.strategy.programs import strategy_of

REWARD = """
def reward_func(queries, prompts, labels):
    return {"rewards": [float(label) for label in labels], "extra_logs": {"seen": float(len(queries))}}
"""
UIDS = ["a", "a", "b", "b", "c", "c"]
QUERIES = ["x"] * len(UIDS)


class Adder:
    """A worker that adds its rank."""

    def __init__(self, rank: int):
        self.rank = rank

    def add(self, left: list[int], right: list[int], *, scale: int = 1) -> list[int]:
        """Return sums, one an item."""
        return [scale * (a + b) + 100 * self.rank for a, b in zip(left, right, strict=True)]

    def total(self, items: list[int]) -> tuple[int, int]:
        """Return the rank and the sum of its items."""
        return self.rank, sum(items)

    def fail_on_one(self) -> None:
        """Raise OSError on rank 1."""
        if self.rank == 1:
            raise OSError("no space left")

    def drop_on_one(self) -> int:
        """Be asked to stop on rank 1, which leaves its work."""
        if self.rank == 1:
            signals.ask("SIGTERM")
            signals.check()
        return self.rank


def everything(folder: str) -> dict[str, Any]:
    """Return what each of the programs below says."""
    comm = strategy_of(zero_stage=0).comm
    programs = groups, rewards, a_wrong_reward, a_stop_in_a_call, a_stop_in_a_reward
    found = {}
    for program in programs:
        signals._state.received = None
        found[program.__name__] = program(comm, Path(folder))
    return found


def groups(comm: Comm, _: Path) -> dict[str, Any]:
    """Return what a group answers, and whether one that fails on one rank leaves the others behind."""
    group = LocalGroup(Adder(comm.rank), comm)
    sums = group.map(Adder.add, [1, 2, 3, 4], [10, 20, 30, 40], scale=2)
    here = [future for future in sums if isinstance(future, int)]
    totals = group.run(Adder.total, sums)
    try:
        group.get(group.run(Adder.fail_on_one))
        failed = None
    except OSError as error:
        failed = str(error)
    agreed = comm.all_gather_object(failed)
    return {"size": group.size, "here": here, "all": group.get(sums), "totals": group.get(totals), "failed": agreed}


def rewards(comm: Comm, folder: Path) -> tuple[list[float], dict[str, list[float]]]:
    """Return the rewards of six samples of three prompts, which each are their own label."""
    result = score_together(comm, _function(folder), QUERIES, QUERIES, [str(n) for n in range(6)], UIDS)
    return result.rewards, result.extra


def a_wrong_reward(comm: Comm, folder: Path) -> str:
    """Return what a rank hears when the reward of a sample of rank 1 fails."""
    try:
        score_together(comm, _function(folder), QUERIES, QUERIES, ["1"] * 5 + ["none"], UIDS)
    except DataError as error:
        return str(error)
    return "no error"


def a_stop_in_a_call(comm: Comm, _: Path) -> str:
    """Return how a call ends in which one rank is asked to stop."""
    group = LocalGroup(Adder(comm.rank), comm)
    try:
        with signals.droppable(comm):
            group.get(group.run(Adder.drop_on_one))
    except Preempted as error:
        return str(error)
    return "went on"


def a_stop_in_a_reward(comm: Comm, folder: Path) -> str:
    """Return how scoring ends when a signal interrupts the function of one rank."""

    class Interrupted(RewardFunction):
        def score(self, *columns: Any) -> Any:
            if comm.rank == 1:
                signals.ask("SIGTERM")
                raise KeyboardInterrupt
            return super().score(*columns)

    try:
        with signals.droppable(comm):
            score_together(comm, Interrupted(_path(folder)), QUERIES, QUERIES, ["1"] * 6, UIDS)
    except Preempted as error:
        return str(error)
    return "went on"


def _path(folder: Path) -> Path:
    return folder / "reward.py"


def _function(folder: Path) -> RewardFunction:
    return RewardFunction(_path(folder))
