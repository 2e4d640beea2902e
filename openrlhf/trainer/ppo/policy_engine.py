"""The policy as its own engine, where there is no other: nothing is carried and nobody sleeps."""

from __future__ import annotations

from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.trainer.ppo.groups import WorkerGroup, deal
from openrlhf.trainer.ppo.workers import PolicyWorker


class PolicyEngine:
    """A :class:`~openrlhf.rollout.engine.RolloutEngine` and weight sync in one: the policy group samples by itself."""

    def __init__(self, policy: WorkerGroup):
        self._policy = policy
        self._version = 0

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return ``sampling.n`` rollouts a prompt, in the order of ``prompts``."""
        parts = self._policy.map(
            PolicyWorker.generate, deal(prompts, self._policy.size), sampling=sampling, version=self._version
        )
        return [rollout for part in self._policy.get(parts) for rollout in part]

    def push(self, version: int) -> None:
        """Remember the version; the weights are there already."""
        self._version = version

    def sleep(self) -> None:
        """Do nothing: the engine owns no memory of its own."""

    def wake_up(self, part: str) -> None:
        """Do nothing, as :meth:`sleep`."""
