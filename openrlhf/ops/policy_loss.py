"""Losses of the policy and of the critic. They return sums; the caller divides by the tokens of the whole step."""

from __future__ import annotations

import torch
from torch import Tensor

from openrlhf.ops.kl import approx_kl
from openrlhf.ops.masking import masked_sum

Metrics = dict[str, tuple[Tensor, Tensor]]
MAX_LOG_RATIO = 20.0


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
) -> tuple[Tensor, Metrics]:
    """Return the clipped surrogate loss of PPO, summed over actions.

    ``-min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A)``; Schulman et al. 2017, https://arxiv.org/abs/1707.06347.
    The logarithm of the ratio is kept within 20, where its exponential stays finite.

    Args:
        log_probs: ``(B, T)`` of the policy that learns.
        old_log_probs: ``(B, T)`` of the policy that sampled.
        advantages: ``(B, T)``.
        mask: ``(B, T)`` true on actions; elsewhere the inputs may hold anything.
        clip: largest useful change of the ratio, to both sides.

    Returns:
        the loss (scalar) and the metrics ``clip_fraction`` and ``approx_kl`` (of old and new policy, k3) as
        (sum, count) pairs.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    free = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    loss = torch.maximum(free, clipped)
    with torch.no_grad():
        metrics = {
            "clip_fraction": _fraction(clipped > free, mask),
            "approx_kl": (masked_sum(approx_kl(-log_ratio, "k3"), mask), mask.sum()),
        }
    return masked_sum(loss, mask), metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the critic's loss ``0.5 * max((V_clipped - R)**2, (V - R)**2)``, summed over actions.

    ``V_clipped`` is ``V`` kept within ``clip`` of the value at sampling time; ``None`` leaves it out.

    Args:
        values: ``(B, T)`` of the critic that learns.
        old_values: ``(B, T)`` at sampling time.
        returns: ``(B, T)`` the targets.
        mask: ``(B, T)`` true on actions; elsewhere the inputs may hold anything.
        clip: largest useful change, or ``None``.

    Returns:
        the loss (scalar) and the metric ``value_clip_fraction`` as a (sum, count) pair.
    """
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    loss = (values - returns).square()
    limited = torch.zeros_like(mask)
    if clip is not None:
        kept = old_values + (values - old_values).clamp(-clip, clip)
        clipped = (kept - returns).square()
        limited = clipped > loss
        loss = torch.maximum(loss, clipped)
    return 0.5 * masked_sum(loss, mask), {"value_clip_fraction": _fraction(limited, mask)}


def _fraction(condition: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often ``condition`` holds on actions, and how many actions there are."""
    return (condition & mask).sum(), mask.sum()
