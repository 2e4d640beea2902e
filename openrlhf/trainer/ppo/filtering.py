"""Dynamic filtering: groups of answers that teach nothing are replaced by those to fresh prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from openrlhf.config.ppo import RolloutConfig
from openrlhf.rollout.types import Prompt
from openrlhf.trainer.ppo.rating import Rated


@dataclass(frozen=True)
class Filled:
    """A batch of groups that passed.

    Attributes:
        rated: their answers; None when no group passed.
        drawn: prompts that were asked.
        dropped: uids of those prompts whose groups did not pass.
    """

    rated: Rated | None
    drawn: int
    dropped: list[str]

    @property
    def pass_rate(self) -> float:
        """Percentage of the groups that passed."""
        return 100.0 * (1 - len(self.dropped) / max(1, self.drawn))


def passing(rated: Rated, samples: int, low: float, high: float) -> list[int]:
    """Return the rows of the groups of ``samples`` answers whose mean score lies between ``low`` and ``high``."""
    means = torch.tensor(rated.judged, dtype=torch.float64).view(-1, samples).mean(dim=1)
    kept = ((low < means) & (means < high)).nonzero().flatten().tolist()
    return [row for group in kept for row in range(group * samples, (group + 1) * samples)]


def fill(
    config: RolloutConfig,
    prompts: Sequence[Prompt],
    ask: Callable[[list[Prompt]], Rated],
    more: Callable[[int, int], list[Prompt]],
) -> Filled:
    """Ask prompts until ``rollout_batch_size`` groups passed, or there are no more prompts.

    DAPO's dynamic sampling, Yu et al. 2025, https://arxiv.org/abs/2503.14476: the batch has no group in which all
    answers are right or all wrong. As many fresh prompts are asked as groups are missing, so that every group that
    passed is learned from, with the weights that sampled it. Everyone who runs the loop sees all scores and decides
    alike.

    Args:
        config: batch size, answers a prompt, and the range of the mean score.
        prompts: the first ones.
        ask: samples and scores answers.
        more: returns so many prompts more, after so many that were drawn; fewer where the data ends.
    """
    samples, (low, high) = config.n_samples_per_prompt, config.filtering_range
    kept, groups, dropped, drawn, wave = [], 0, [], 0, list(prompts)
    while wave:
        drawn += len(wave)
        rated = ask(wave)
        rows = passing(rated, samples, low, high)
        kept += [rated.select(rows)] if rows else []
        groups += len(rows) // samples
        dropped += [prompt.uid for number, prompt in enumerate(wave) if number * samples not in rows]
        wave = more(config.rollout_batch_size - groups, drawn)
    return Filled(Rated.join(kept) if kept else None, drawn, dropped)
