"""Advantages: from token rewards through time, and from scores through their group.

Time runs over actions only. Positions off the mask are skipped, so the state after an action is that of the next
action even when another turn of a conversation lies between them. Nothing here has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gae(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and the returns that a critic learns.

    ``delta_t = r_t + gamma * V_{t+1} - V_t``, ``A_t = delta_t + gamma * lambd * A_{t+1}``, ``R_t = A_t + V_t``; after
    the last action both V and A are 0. Schulman et al. 2016, https://arxiv.org/abs/1506.02438: with a critic, for
    rewards within an answer or long answers, where ``lambd`` below 1 trades noise for the critic's mistakes.

    Args:
        values: ``(B, T)`` value of the state before each action.
        rewards: ``(B, T)``.
        mask: ``(B, T)`` true on actions.
        gamma: discount an action.
        lambd: 1 trusts the rewards, 0 trusts the values.

    Returns:
        advantages and returns, ``(B, T)`` float32, 0 off the actions.
    """
    mask = mask.bool()
    values = torch.where(mask, values.float(), 0.0)
    rewards = torch.where(mask, rewards.float(), 0.0)
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(len(values))
    next_advantage = next_value
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lambd * next_advantage
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages, advantages + values


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return ``G_t = r_t + gamma * G_{t+1}`` over the actions, ``(B, T)`` float32, 0 off the actions.

    REINFORCE, Williams 1992, https://doi.org/10.1007/BF00992696: what every estimator without a critic learns from,
    after its baseline; ``gamma`` below 1 gives actions that are far from the reward less of it.
    """
    return gae(torch.zeros_like(rewards), rewards, mask, gamma, 1.0)[1]


def none(scores: Tensor, n: int) -> Tensor:
    """Return the scores ``(P * n,)`` as they are: no baseline.

    With a critic that is GAE, where values are the baseline: for long answers whose parts deserve credit of their own,
    at the price of a second model. Without one it is REINFORCE++ (Hu 2025, https://arxiv.org/abs/2501.03262), where
    the mean over the batch is the baseline: the cheapest, and right for one answer a prompt.
    """
    return scores


@torch.no_grad()
def rloo(scores: Tensor, n: int) -> Tensor:
    """Return each score minus the mean of the others of its group: ``r_i - sum_{j != i} r_j / (n - 1)``.

    REINFORCE leave-one-out, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: an unbiased baseline for each
    prompt, without a critic, for prompts of different difficulty and few answers to each.

    Args:
        scores: ``(P * n,)``, the ``n`` answers of one prompt next to each other.
        n: answers to a prompt.

    Raises:
        ValueError: ``n`` is below 2 or does not divide the number of scores.
    """
    groups = _groups(scores, n)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (n - 1)
    return (groups - others).flatten().to(scores.dtype)


@torch.no_grad()
def group_mean(scores: Tensor, n: int) -> Tensor:
    """Return each score minus the mean of its group: ``r_i - mean(r)``.

    Whitened over the batch afterwards it is REINFORCE++-baseline (Hu 2025, https://arxiv.org/abs/2501.03262), steady
    for rewards of any scale. As it is, it is Dr. GRPO (Liu et al. 2025, https://arxiv.org/abs/2503.20783): GRPO
    without the division by the standard deviation, which would give groups that are nearly alike the most weight.

    Args:
        scores: ``(P * n,)``, the ``n`` answers of one prompt next to each other.
        n: answers to a prompt.

    Raises:
        ValueError: ``n`` is below 2 or does not divide the number of scores.
    """
    groups = _groups(scores, n)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten().to(scores.dtype)


@torch.no_grad()
def group_norm(scores: Tensor, n: int) -> Tensor:
    """Return each score in standard deviations from the mean of its group: ``(r_i - mean(r)) / (std(r) + 1e-9)``.

    GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300, usually with ``--use_kl_loss --kl_estimator k3``: every
    prompt counts alike, whatever the scale of its rewards. The standard deviation is that of a sample (``n - 1``).
    Arguments and errors as of :func:`group_mean`.
    """
    groups = _groups(scores, n)
    mean, std = groups.mean(dim=1, keepdim=True), groups.std(dim=1, keepdim=True)
    return ((groups - mean) / (std + 1e-9)).flatten().to(scores.dtype)


@torch.no_grad()
def remax(scores: Tensor, n: int, greedy: Tensor) -> Tensor:
    """Return each score minus that of the greedy answer to its prompt: ``r_i - r(greedy)``.

    ReMax, Li et al. 2023, https://arxiv.org/abs/2310.10505: a baseline for each prompt from one more answer instead of
    a group or a critic, for learned rewards and one answer a prompt.

    Args:
        scores: ``(P * n,)``, the ``n`` answers of one prompt next to each other.
        n: answers to a prompt.
        greedy: ``(P,)`` scores of the greedy answers.

    Raises:
        ValueError: there is not one greedy answer for each ``n`` scores.
    """
    if len(greedy) * n != len(scores):
        raise ValueError(f"{len(scores)} scores, {n} a prompt, do not go with {len(greedy)} greedy ones")
    return scores - greedy.repeat_interleave(n)


def _groups(scores: Tensor, n: int) -> Tensor:
    """Return scores ``(P * n,)`` as ``(P, n)`` in float64, where the mean of equal scores is exactly that score."""
    if n < 2:
        raise ValueError(f"a group baseline needs at least 2 samples per prompt, not {n}")
    if len(scores) % n:
        raise ValueError(f"{len(scores)} scores do not divide into groups of {n}")
    return scores.double().view(-1, n)
