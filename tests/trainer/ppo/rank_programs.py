"""What the ranks of the tests of one program run; every function is called by all ranks."""

from __future__ import annotations

from typing import Any

from openrlhf.errors import DataError, Preempted
from openrlhf.rollout.reward_result import RewardResult
from openrlhf.rollout.types import Prompt, Rollout
from openrlhf.strategy import signals
from openrlhf.strategy.comm import Comm
from openrlhf.trainer.ppo.groups import LocalGroup
from openrlhf.trainer.ppo.together import score_together
from tests.strategy.programs import strategy_of
from tests.trainer.ppo.harness import rollout_of

UIDS = ["a", "a", "b", "b", "c", "c"]
ROLLOUTS = [rollout_of(Prompt(uid, uid, (1,)), [number]) for number, uid in enumerate(UIDS)]


def judge(rollouts: list[Rollout]) -> RewardResult:
    """Return the answers as rewards, and beside each how many were asked about at once."""
    seen = {"seen": [float(len(rollouts))] * len(rollouts)}
    return RewardResult([float(rollout.response_ids[0]) for rollout in rollouts], seen)


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


def everything() -> dict[str, Any]:
    """Return what each of the programs below says."""
    comm = strategy_of(zero_stage=0).comm
    programs = groups, rewards, a_wrong_reward, a_stop_in_a_call, a_stop_in_a_reward
    found = {}
    for program in programs:
        signals._state.received = None
        found[program.__name__] = program(comm)
    return found


def groups(comm: Comm) -> dict[str, Any]:
    """Return what a group answers, and whether one that fails on one rank leaves the others behind."""
    group = LocalGroup(Adder(comm.rank), comm)
    sums = group.map(Adder.add, [1, 2, 3, 4], [10, 20, 30, 40], scale=2)
    here = [future for future in sums if isinstance(future, int)]
    totals = group.run(Adder.total, sums)
    try:
        with signals.held():  # as checkpoints are written
            group.get(group.run(Adder.fail_on_one))
        failed = None
    except OSError as error:
        failed = str(error)
    agreed = comm.all_gather_object(failed)
    return {"size": group.size, "here": here, "all": group.get(sums), "totals": group.get(totals), "failed": agreed}


def rewards(comm: Comm) -> tuple[list[float], dict[str, list[float]]]:
    """Return the rewards of six samples of three prompts."""
    result = score_together(comm, ROLLOUTS, judge)
    return result.rewards, result.extra


def a_wrong_reward(comm: Comm) -> str:
    """Return what a rank hears when the reward of a sample of rank 1 fails."""

    def fail_on_the_last(rollouts: list[Rollout]) -> RewardResult:
        if rollouts[-1] is ROLLOUTS[-1]:
            raise DataError("no reward for c")
        return judge(rollouts)

    try:
        score_together(comm, ROLLOUTS, fail_on_the_last)
    except DataError as error:
        return str(error)
    return "no error"


def a_stop_in_a_call(comm: Comm) -> str:
    """Return how a call ends in which one rank is asked to stop."""
    group = LocalGroup(Adder(comm.rank), comm)
    try:
        with signals.droppable(comm):
            group.get(group.run(Adder.drop_on_one))
    except Preempted as error:
        return str(error)
    return "went on"


def a_stop_in_a_reward(comm: Comm) -> str:
    """Return how scoring ends when a signal interrupts the function of one rank."""

    def interrupted(rollouts: list[Rollout]) -> RewardResult:
        if comm.rank == 1:
            signals.ask("SIGTERM")
            raise KeyboardInterrupt
        return judge(rollouts)

    try:
        with signals.droppable(comm):
            score_together(comm, ROLLOUTS, interrupted)
    except Preempted as error:
        return str(error)
    return "went on"
