"""Losses over pairs of a chosen and a rejected answer. They return sums; the caller divides by the
pairs of the step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Return ``-log sigmoid(chosen - rejected - margin)``, summed over pairs.

    Bradley-Terry with the margin of Llama 2, https://arxiv.org/abs/2307.09288, section 3.2.2.

    Args:
        chosen: ``(B,)`` rewards of the chosen answers.
        rejected: ``(B,)`` rewards of the rejected answers.
        margin: ``(B,)`` by how much the chosen answer should win, or ``None`` for 0.
    """
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin.to(difference.dtype)
    return -F.logsigmoid(difference).sum()


def log_exp_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return ``log(1 + exp(rejected - chosen))``, summed over pairs; any difference is safe from overflow.

    Args:
        chosen: ``(B,)`` rewards of the chosen answers.
        rejected: ``(B,)`` rewards of the rejected answers.
    """
    return F.softplus(rejected - chosen).sum()
