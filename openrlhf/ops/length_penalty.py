"""Penalties for answers that are too long or do not end: on the scores ``(B,)``, before any baseline."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def overlong_penalty(lengths: Tensor, limit: int, buffer: float, factor: float) -> Tensor:
    """Return what to add to the scores ``(B,)``: 0 up to ``limit - buffer`` tokens, then evenly down to ``-factor``.

    ``-min(length - (limit - buffer), buffer) / buffer * factor`` where that is negative. The soft overlong punishment
    of DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476: it tells a policy that grows longer where the limit is
    before the limit cuts it off.

    Args:
        lengths: ``(B,)`` tokens that the policy chose.
        limit: most tokens of an answer.
        buffer: tokens before the limit in which the penalty grows.
        factor: the penalty at the limit.
    """
    excess = (lengths.double() - (limit - buffer)).clamp(0, buffer)
    return (-excess / buffer * factor).float()


@torch.no_grad()
def stop_properly(scores: Tensor, truncated: Tensor, coef: float) -> Tensor:
    """Return the scores ``(B,)`` with those of answers that were cut off multiplied by ``coef``, or replaced by it.

    From 0 to 1 it multiplies, below 0 it is the score: for policies that are to learn to come to an end (ProRL, Liu et
    al. 2025, https://arxiv.org/abs/2505.24864). Multiplying makes a negative score better, so take a negative ``coef``
    where scores may be negative.

    Args:
        scores: ``(B,)``.
        truncated: ``(B,)`` bool, the answer was cut off at the limit.
        coef: at most 1.
    """
    return torch.where(truncated, scores * coef if coef >= 0 else torch.full_like(scores, coef), scores)
