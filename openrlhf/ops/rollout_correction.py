"""Weights for samples whose engine gave other log-probs than the policy that was meant to sample them.

``w = exp(log policy - log engine)``, one an action, without a gradient: the importance ratio between the policy before
the update and what sampled in its name (another kernel, another precision, older weights).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openrlhf.ops.masking import masked_sum, row_means

MAX_LOG_WEIGHT = 20.0
Metrics = dict[str, tuple[Tensor, Tensor]]


class Correction(NamedTuple):
    """What an action's loss is multiplied with.

    Attributes:
        weights: ``(B, T)``, 0 off the actions.
        metrics: ``vllm_kl`` (mean of ``log engine - log policy``), ``is_weight`` (mean of the weights) and
            ``is_outside`` (share of the actions whose weight was cut or left out), as (sum, count) pairs.
    """

    weights: Tensor
    metrics: Metrics


@torch.no_grad()
def rollout_correction(
    log_probs: Tensor, engine_log_probs: Tensor, mask: Tensor, *, kind: str, low: float, high: float
) -> Correction:
    """Return the weights of the actions.

    * ``tis``, truncated importance sampling: ``clamp(w, low, high)``; https://fengyao.notion.site/off-policy-rl. The
      ordinary choice.
    * ``icepop``: ``w`` where ``low <= w <= high``, else 0; Ling team 2025, https://arxiv.org/abs/2510.18855. For
      mixtures of experts, where single tokens are far off.
    * ``seq-mask-tis``: ``w`` in sequences whose geometric mean of ``w`` lies in the range, else 0; Liu et al. 2025,
      https://richardli.xyz/rl-collapse. For long answers, where one bad stretch spoils the whole.

    The logarithm of a weight is kept within 20, so none overflows, and no 0 meets an infinity.

    Args:
        log_probs: ``(B, T)`` of the policy before the update.
        engine_log_probs: ``(B, T)`` from the engine that sampled.
        mask: ``(B, T)`` true on actions; elsewhere the inputs may hold anything.
        kind: one of those above.
        low: smallest weight.
        high: largest weight.

    Raises:
        ValueError: for any other kind.
    """
    mask = mask.bool()
    gap = torch.where(mask, log_probs - engine_log_probs, 0.0)
    raw = gap.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
    if kind == "seq-mask-tis":
        mean = row_means(gap, mask).clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
        judged = mean[:, None].expand_as(raw)
    elif kind in ("tis", "icepop"):
        judged = raw
    else:
        raise ValueError(f"unknown correction {kind!r}")
    outside = mask & ((judged < low) | (judged > high))
    weights = raw.clamp(low, high) if kind == "tis" else torch.where(outside, 0.0, raw)
    weights, count = torch.where(mask, weights, 0.0), mask.sum()
    metrics = {
        "vllm_kl": (masked_sum(-gap, mask), count),
        "is_weight": (weights.sum(), count),
        "is_outside": (outside.sum(), count),
    }
    return Correction(weights, metrics)
