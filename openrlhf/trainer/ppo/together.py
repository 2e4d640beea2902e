"""What the ranks of one program do together, so that each hears everything and nothing is done twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from openrlhf.errors import OpenRLHFError, Preempted
from openrlhf.rollout.reward_result import RewardResult
from openrlhf.rollout.types import Rollout
from openrlhf.strategy import signals
from openrlhf.strategy.comm import Comm
from openrlhf.trainer.ppo.groups import deal


def score_together(
    comm: Comm, rollouts: Sequence[Rollout], ask: Callable[[list[Rollout]], RewardResult]
) -> RewardResult:
    """Return what ``ask`` says of all rollouts: every rank asks about those of some prompts and tells the others.

    A signal may interrupt ``ask``, which runs code that is not ours. All ranks raise what one of them raised, and
    ``Preempted`` when one was asked to stop.
    """
    start, end = share_of_prompts([rollout.prompt.uid for rollout in rollouts], comm.world_size)[comm.rank]
    found: RewardResult | OpenRLHFError | None = RewardResult([])
    try:
        if start < end:
            with signals.interruptible():
                found = ask(list(rollouts[start:end]))
    except (Preempted, KeyboardInterrupt):
        if not signals.requested():
            raise
        found = None
    except OpenRLHFError as error:
        found = error
    signals.check_together(comm, "the reward function")
    return _joined(comm.all_gather_object(found))


def share_of_prompts(uids: Sequence[str], parts: int) -> list[tuple[int, int]]:
    """Return where each part begins and ends; rows of one prompt, which stand side by side, stay together."""
    sizes = [len(list(rows)) for _, rows in groupby(uids)]
    counts = [sum(share) for share in deal(sizes, parts)]
    ends = [sum(counts[: part + 1]) for part in range(parts)]
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _joined(parts: Sequence[RewardResult | OpenRLHFError]) -> RewardResult:
    """Return the parts as one. Raises the first error among them."""
    for part in parts:
        if isinstance(part, OpenRLHFError):
            raise part
    return RewardResult.join(parts, "the source of --remote_rm_url")
