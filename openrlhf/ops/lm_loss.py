"""Losses of language modelling. They return sums; the caller divides by the tokens of the whole step."""

from __future__ import annotations

from torch import Tensor

from openrlhf.ops.masking import masked_sum


def next_token_loss(log_probs: Tensor, loss_mask: Tensor) -> Tensor:
    """Return the negative log-likelihood, summed over the tokens that count.

    Args:
        log_probs: ``(B, T)`` of the tokens that follow.
        loss_mask: ``(B, T)`` true where a token counts.
    """
    return -masked_sum(log_probs, loss_mask)
