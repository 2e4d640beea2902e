"""The groups of workers of a run: who holds which model, wherever the workers live."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from openrlhf.strategy.comm import Comm, SoloComm
from openrlhf.trainer.ppo.groups import WorkerGroup


@dataclass(frozen=True)
class Roles:
    """The groups of workers of a run; a role that the run does not need is None.

    ``shared``: the policy and the critic live on the same devices, so they learn one after the other. ``comm``: the
    processes that run the loop, each with all samples: the driver alone on Ray, every rank under a launcher.
    ``watched`` looks after workers and engines elsewhere while this process runs code that does not wait for them.
    """

    policy: WorkerGroup
    critic: WorkerGroup | None = None
    reference: WorkerGroup | None = None
    rewards: Sequence[WorkerGroup] = ()
    process: WorkerGroup | None = None
    shared: bool = False
    comm: Comm = SoloComm()
    watched: Callable[[], AbstractContextManager] = nullcontext

    @property
    def groups(self) -> list[WorkerGroup]:
        """All groups that there are, the policy's first."""
        named = (self.policy, self.critic, self.reference, *self.rewards, self.process)
        return [group for group in named if group is not None]

    @property
    def shards(self) -> int:
        """Into how many shards a rollout is cut, so that every group gets equally many: the least common multiple."""
        return math.lcm(*(group.size for group in self.groups))
