"""The prompts of a run in the order in which they are asked: every episode has an order of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from openrlhf.rollout.types import Prompt


class PromptStream:
    """Gives out prompts; no batch of them reaches over the end of an episode.

    So no prompt comes twice in a rollout step, where it would be answered alike, and every episode has all of them.

    Args:
        prompts: see below.
        seed: of the run.
        episodes: passes over the prompts.

    Attributes:
        prompts: all of them.
        position: prompts taken since the run began.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, episodes: int):
        self.prompts, self._seed, self._episodes = prompts, seed, episodes
        self.position = 0

    @property
    def left(self) -> int:
        """Prompts not taken yet, of all episodes."""
        return self._episodes * len(self.prompts) - self.position

    @property
    def episode(self) -> int:
        """The episode of the next prompt, counted from 0."""
        return self.position // len(self.prompts)

    def steps_left(self, size: int) -> int:
        """Return how many batches of ``size`` prompts there still are; the last of an episode may be short."""
        episodes, rest = divmod(self.left, len(self.prompts))
        return episodes * math.ceil(len(self.prompts) / size) + math.ceil(rest / size)

    def ahead(self, count: int, skipped: int = 0) -> list[Prompt]:
        """Return the next ``count`` prompts of this episode after ``skipped``, or as many as there are.

        They are not taken: that is for the caller to say, by moving ``position``, when they have been used.
        """
        if not self.left:
            return []
        row = self.position % len(self.prompts) + skipped
        order = episode_order(len(self.prompts), self._seed, self.episode)
        return [self.prompts[index] for index in order[row : row + count]]


def episode_order(prompts: int, seed: int, episode: int) -> list[int]:
    """Return a permutation of the prompts that is the same wherever the run is resumed."""
    digest = hashlib.sha256(f"prompts/{seed}/{episode}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randperm(prompts, generator=generator).tolist()
