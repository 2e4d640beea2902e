"""Losses over pairs of a chosen and a rejected answer, and over single answers that are desirable or not.

They return sums; the caller divides by the pairs or answers of the step.
"""

from __future__ import annotations

import torch
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


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return ``-(1 - eps) * log sigmoid(beta * z) - eps * log sigmoid(-beta * z)``, ``z = chosen - rejected``, summed.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; with ``eps`` it is the conservative variant of
    https://ericmitchell.ai/cdpo.pdf for labels that are wrong now and then.

    Args:
        chosen: ``(B,)`` log-ratios of policy and reference, summed over the tokens of the chosen answers.
        rejected: ``(B,)`` the same of the rejected answers.
        beta: how strongly the pairs count against the reference.
        label_smoothing: ``eps``, the share of labels taken to be wrong.
    """
    z = beta * (chosen - rejected)
    return -((1.0 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)).sum()


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return ``(chosen - rejected - 1 / (2 * beta))**2``, summed over pairs.

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17, with sums over tokens.

    Args:
        chosen: ``(B,)`` log-ratios of policy and reference, summed over the tokens of the chosen answers.
        rejected: ``(B,)`` the same of the rejected answers.
        beta: the strength of the regularisation.
    """
    return (chosen - rejected - 1.0 / (2.0 * beta)).square().sum()


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, target_margin: float) -> Tensor:
    """Return ``-log sigmoid(beta * (chosen - rejected) - target_margin)``, summed over pairs.

    Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6.

    Args:
        chosen: ``(B,)`` mean log-probs of the tokens of the chosen answers.
        rejected: ``(B,)`` the same of the rejected answers.
        beta: scale of the rewards.
        target_margin: by how much the chosen reward should win.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - target_margin).sum()


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return ``-chosen - beta * log sigmoid(log odds(chosen) - log odds(rejected))``, summed over pairs.

    ``odds = p / (1 - p)`` with ``p`` the exponential of the mean log-prob. Hong et al. 2024,
    https://arxiv.org/abs/2403.07691, equations 4 and 7. A mean of exactly 0, a certain answer, counts as just below.

    Args:
        chosen: ``(B,)`` mean log-probs of the tokens of the chosen answers.
        rejected: ``(B,)`` the same of the rejected answers.
        beta: weight of the odds ratio, the paper's lambda.
    """
    odds = [log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-6))) for log_p in (chosen, rejected)]
    return -(chosen + beta * F.logsigmoid(odds[0] - odds[1])).sum()


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return ``w * (1 - sigmoid(beta * (r - kl)))`` for desirable answers and ``w * (1 - sigmoid(beta * (kl - r)))``
    for the others, summed.

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306.

    Args:
        log_ratios: ``(B,)`` ``r``, log-ratios of policy and reference, summed over the tokens of the answers.
        desirable: ``(B,)`` true for desirable answers.
        kl: scalar, the divergence of the policy from the reference; no gradient flows into it.
        beta: how strongly the answers count against the reference.
        desirable_weight: weight of desirable answers.
        undesirable_weight: weight of the others.
    """
    sign = torch.where(desirable.bool(), 1.0, -1.0)
    weight = torch.where(desirable.bool(), desirable_weight, undesirable_weight)
    return (weight * torch.sigmoid(-sign * beta * (log_ratios - kl.detach()))).sum()


def paired_kto_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, chosen_kl: Tensor, rejected_kl: Tensor
) -> Tensor:
    """Return ``2 - sigmoid(beta * (c - kl_r)) - sigmoid(beta * (kl_c - r))``, summed over pairs.

    Each side is measured against the divergence of the other. Ethayarajh et al. 2024,
    https://arxiv.org/abs/2402.01306, as first published for pairs.

    Args:
        chosen: ``(B,)`` ``c``, log-ratios of policy and reference, summed over the tokens of the chosen answers.
        rejected: ``(B,)`` ``r``, the same of the rejected answers.
        beta: how strongly the pairs count against the reference.
        chosen_kl: scalar ``kl_c``, the mean of ``c`` over the optimizer step, not below 0; no gradient flows into it.
        rejected_kl: scalar ``kl_r``, the same of ``r``.
    """
    lost = torch.sigmoid(beta * (rejected_kl.detach() - chosen)) + torch.sigmoid(
        beta * (rejected - chosen_kl.detach())
    )
    return lost.sum()
