"""Losses of language modelling. They return sums; the caller divides by the tokens of the whole step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openrlhf.ops.masking import masked_sum


def next_token_loss(log_probs: Tensor, loss_mask: Tensor) -> Tensor:
    """Return the negative log-likelihood, summed over the tokens that count.

    Args:
        log_probs: ``(B, T)`` of the tokens that follow.
        loss_mask: ``(B, T)`` true where a token counts.
    """
    return -masked_sum(log_probs, loss_mask)


def distillation_loss(cross_entropy: Tensor, loss_mask: Tensor) -> Tensor:
    """Return ``-sum_v p_teacher(v) log p_student(v)``, summed over the tokens that count.

    Its gradient is that of the divergence of the student from the teacher, which it exceeds by the teacher's entropy.
    Hinton et al. 2015, https://arxiv.org/abs/1503.02531.

    Args:
        cross_entropy: ``(B, T)`` at every token.
        loss_mask: ``(B, T)`` true where a token counts.
    """
    return masked_sum(cross_entropy, loss_mask)


def process_reward_loss(logits: Tensor, labels: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the labels of steps, summed, and how many steps were judged right.

    A hard label is a token; a soft one the probability of the first of two ``tokens``, and is judged right where the
    likelier of the two is. Uesato et al. 2022, https://arxiv.org/abs/2211.14275; Lightman et al. 2023,
    https://arxiv.org/abs/2305.20050.

    Args:
        logits: ``(M, V)`` of the token after the end of each step.
        labels: ``(M,)`` int64 token ids, or float probabilities.
        tokens: ``(K,)`` int64, the only tokens that a label can be; None for the whole vocabulary.
    """
    logits = logits.float()
    if tokens is not None:
        logits = logits[:, tokens]
    if labels.is_floating_point():
        target = torch.stack([labels, 1.0 - labels], dim=-1)
        best = target.argmax(dim=-1)
    else:
        target = best = labels if tokens is None else (labels[:, None] == tokens).int().argmax(dim=-1)
    return F.cross_entropy(logits, target, reduction="sum"), (logits.argmax(dim=-1) == best).sum()
