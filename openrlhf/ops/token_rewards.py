"""From one score a sequence to one reward a token."""

from __future__ import annotations

import torch
from torch import Tensor


def last_action(mask: Tensor) -> Tensor:
    """Return a mask ``(B, T)`` with only the last true position of each row of ``mask``; empty rows stay empty."""
    mask = mask.bool()
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    return mask & (position == position.amax(dim=1, keepdim=True))


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
) -> Tensor:
    """Return rewards ``(B, T)`` in float32: the score on the last action, ``-kl_coef * kl`` on every action.

    Args:
        scores: ``(B,)`` one score a sequence.
        kl: ``(B, T)`` per-token divergence from the reference; ignored off the actions.
        mask: ``(B, T)`` true on actions. A row without any gets no reward.
        kl_coef: weight of the penalty; 0 or less means none.
    """
    rewards = torch.where(last_action(mask), scores.float()[:, None], 0.0)
    if kl_coef > 0:
        rewards = rewards - kl_coef * torch.where(mask.bool(), kl.float(), 0.0)
    return rewards
