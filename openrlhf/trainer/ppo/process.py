"""Process rewards in PPO: a model that judges every step of an answer, where the step ends, as it was trained to.

A step ends with ``--prm_placeholder_token``, which the policy itself writes. The reward of that action is the
probability that the process reward model gives there to the first of ``--prm_reward_tokens`` against the others.
Lightman et al. 2023, https://arxiv.org/abs/2305.20050; in PPO: Wang et al. 2023, https://arxiv.org/abs/2312.08935.

An estimator with a baseline compares whole answers, steps and all; an action is worth what comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.datasets.process_reward import single_token
from openrlhf.errors import UsageError
from openrlhf.rollout.types import SequenceBatch
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.ppo.assembly import close_with_eos
from openrlhf.trainer.ppo.models import load_process_reward_model
from openrlhf.trainer.ppo.worker_base import Worker

Steps = list[list[float]]
"""The rewards of the steps of each answer, in their order."""


class StepTokens(NamedTuple):
    """The id that ends a step, and the ids that a step is judged with, the positive one first."""

    placeholder: int
    rewards: list[int]


def step_tokens(config: PPOConfig, tokenizer: Any) -> StepTokens:
    """Return the tokens of the flags. Raises UsageError when one is not a single token, or ends an answer."""
    reward = config.reward
    placeholder = single_token(tokenizer, reward.prm_placeholder_token, "--prm_placeholder_token")
    if placeholder == tokenizer.eos_token_id:
        raise UsageError(
            f"--prm_placeholder_token {reward.prm_placeholder_token} ends an answer, so it cannot end each of its "
            "steps: name the --placeholder_token that the process reward model was trained with"
        )
    return StepTokens(
        placeholder, [single_token(tokenizer, text, "--prm_reward_tokens") for text in reward.prm_reward_tokens]
    )


def ends_of_steps(batch: SequenceBatch, placeholder: int) -> Tensor:
    """Return ``(B, T)`` bool: the actions that chose the token at the end of a step."""
    return batch.action_mask & (batch.sequences[:, 1:] == placeholder)


def laid_out(batch: SequenceBatch, steps: Steps, placeholder: int) -> Tensor:
    """Return the rewards of the steps as ``(B, T)``, 0 on all other actions."""
    ends = ends_of_steps(batch, placeholder)
    rewards = torch.zeros(ends.shape)
    rewards[ends] = torch.tensor([value for row in steps for value in row])
    return rewards


class ProcessRewardWorker(Worker):
    """A process reward model: one score a step."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy):
        super().__init__(config, strategy)
        self.tokens = step_tokens(config, self.tokenizer)
        self.model = load_process_reward_model(config, strategy, self.tokenizer)

    def score(self, batches: list[SequenceBatch]) -> list[Steps]:
        """Return the scores of the steps of every answer, each from 0 to 1; none for one without a step."""
        scores = self._forward(batches, self._scores)
        ends = [ends_of_steps(batch, self.tokens.placeholder) for batch in batches]
        return [
            [row[keep].tolist() for row, keep in zip(found, where, strict=True)]
            for found, where in zip(scores, ends, strict=True)
        ]

    def _scores(self, batch: SequenceBatch) -> Tensor:
        """Return ``(B, T)``: what the model says at the end of a step, on the action that ended it."""
        sequences, attention_mask = close_with_eos(batch.sequences, batch.attention_mask, self.tokenizer.eos_token_id)
        ends = ends_of_steps(batch, self.tokens.placeholder)
        read_at = torch.nn.functional.pad(ends, (1, 0))
        logits = self.model(sequences, attention_mask, where=read_at, read="logits").logits
        scores = torch.zeros(ends.shape, device=ends.device)
        scores[ends] = logits[:, self.tokens.rewards].float().softmax(dim=-1)[:, 0]
        return scores


def sums_of(steps: Sequence[Sequence[float]]) -> Tensor:
    """Return ``(N,)``: what the steps of each answer are worth together."""
    return torch.tensor([sum(row) for row in steps], dtype=torch.float64)
