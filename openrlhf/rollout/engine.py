"""What the PPO loop asks of whatever generates, and of whatever carries new weights to it."""

from __future__ import annotations

from typing import Protocol

from openrlhf.rollout.types import Prompt, Rollout, SamplingParams

WEIGHTS, CACHE = "weights", "kv_cache"
"""The parts of an engine's memory, by vLLM's names."""


class RolloutEngine(Protocol):
    """Turns prompts into sampled answers."""

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return ``sampling.n`` rollouts a prompt, those of one prompt next to each other, in the order of
        ``prompts``.
        """
        ...

    def sleep(self) -> None:
        """Give memory back while others train."""
        ...

    def wake_up(self, part: str) -> None:
        """Take a part of the memory back: ``WEIGHTS`` before new ones come, ``CACHE`` before generating; what is
        awake stays so.
        """
        ...


class WeightSync(Protocol):
    """Brings the policy's weights to the engines."""

    def push(self, version: int) -> None:
        """Return when every engine serves the policy's present weights under ``version``."""
        ...
