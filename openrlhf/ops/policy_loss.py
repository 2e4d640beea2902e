"""Losses of the policy and of the critic, one number an action; :func:`reduced` sums them for the optimizer step.

A policy loss is ``(log_probs, old_log_probs, advantages, mask, clip) -> Surrogate``. Where an input is off the mask it
may hold anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openrlhf.ops.kl import approx_kl
from openrlhf.ops.masking import masked_sum, row_means

Metrics = dict[str, tuple[Tensor, Tensor]]
MAX_LOG_RATIO = 20.0
"""Where the exponential of a log-ratio is still finite, and its square too."""


class Clip(NamedTuple):
    """How far the ratio of new and old policy may go before nothing more is gained.

    Attributes:
        low: below 1.
        high: above 1; larger than ``low`` it is the clip-higher of DAPO (Yu et al. 2025,
            https://arxiv.org/abs/2503.14476), which lets unlikely tokens grow.
        dual: with negative advantages the loss is at most ``dual`` times the advantage; above 1, or None. Ye et al.
            2019, https://arxiv.org/abs/1912.09729: for data of a policy that is far away.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


class Surrogate(NamedTuple):
    """What is minimised, for each action.

    Attributes:
        loss: ``(B, T)``, 0 off the actions.
        clipped: ``(B, T)`` bool, where the clip holds the gradient back.
        log_ratio: ``(B, T)`` of new and old policy, as the loss reads it.
    """

    loss: Tensor
    clipped: Tensor
    log_ratio: Tensor

    def metrics(self, mask: Tensor) -> Metrics:
        """Return ``clip_fraction`` and ``approx_kl`` (of old and new policy, k3) as (sum, count) pairs."""
        with torch.no_grad():
            drift = masked_sum(approx_kl(-self.log_ratio, "k3"), mask)
            return {"clip_fraction": _fraction(self.clipped, mask), "approx_kl": (drift, mask.sum())}


def ppo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip) -> Surrogate:
    """Return PPO's clipped loss ``-min(ratio * A, clamp(ratio, 1 - low, 1 + high) * A)``.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347: the ordinary choice. The logarithm of the ratio is kept
    within 20, where its exponential stays finite.

    Args:
        log_probs: ``(B, T)`` of the policy that learns.
        old_log_probs: ``(B, T)`` of the policy that sampled.
        advantages: ``(B, T)``.
        mask: ``(B, T)`` true on actions.
        clip: largest useful changes of the ratio.
    """
    return _clipped(_log_ratio(log_probs, old_log_probs, mask), advantages, mask, clip)


def gspo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip) -> Surrogate:
    """Return PPO's loss with one ratio a sequence, ``exp(mean over its actions of log(new / old))``.

    GSPO, Zheng et al. 2025, https://arxiv.org/abs/2507.18071; averaged over the actions of each sequence, then over
    sequences. For mixtures of experts and long answers, where ratios of single tokens are noisy. The mean moves less
    than its parts: the paper clips at ``--eps_clip_low_high 3e-4 4e-4``. Arguments as :func:`ppo`.
    """
    log_ratio = row_means(_log_ratio(log_probs, old_log_probs, mask), mask)
    return _clipped(log_ratio[:, None].expand_as(log_probs), advantages, mask, clip)


def cispo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip) -> Surrogate:
    """Return ``-sg(clamp(ratio, 1 - low, 1 + high)) * A * log new``, with no gradient through ``sg``.

    CISPO, MiniMax 2025, https://arxiv.org/abs/2506.13585: the weight is clipped, not the gradient, so that every token
    goes on learning; for several updates on the same samples. The paper has no lower bound: ``--eps_clip_low_high 1``
    and an upper one. ``clip.dual`` is not used. Arguments as :func:`ppo`.
    """
    mask = mask.bool()
    log_ratio = _log_ratio(log_probs, old_log_probs, mask)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    loss = -weight * torch.where(mask, advantages, 0.0) * torch.where(mask, log_probs, 0.0)
    return Surrogate(loss, weight != ratio, log_ratio)


def reduced(loss: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Return the sum of ``loss`` (B, T) over actions, or with ``"sequence"`` of the mean of each sequence.

    Divided by :func:`weight`, summed over the micro-batches and ranks of an optimizer step, it is the mean over the
    actions, or over the sequences, of the whole step.
    """
    return row_means(loss, mask).sum() if reduction == "sequence" else masked_sum(loss, mask)


def weight(mask: Tensor, reduction: str) -> Tensor:
    """Return how many actions there are, or with ``"sequence"`` how many sequences that have any."""
    return mask.any(dim=-1).sum() if reduction == "sequence" else mask.sum()


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
    reduction: str = "token",
) -> tuple[Tensor, Metrics]:
    """Return the critic's loss ``0.5 * max((V_clipped - R)**2, (V - R)**2)``, :func:`reduced`.

    ``V_clipped`` is ``V`` kept within ``clip`` of the value at sampling time; ``None`` leaves it out. The clip that
    implementations of PPO share (Engstrom et al. 2020, https://arxiv.org/abs/2005.12729) keeps a critic that learns
    several times from the same samples near the one that the advantages came from. Returns further away than ``clip``
    are reached more slowly: widen it for rewards of a larger scale.

    Args:
        values: ``(B, T)`` of the critic that learns.
        old_values: ``(B, T)`` at sampling time.
        returns: ``(B, T)`` the targets.
        mask: ``(B, T)`` true on actions; elsewhere the inputs may hold anything.
        clip: largest useful change, or ``None``.
        reduction: ``"token"`` or ``"sequence"``.

    Returns:
        the loss (scalar) and the metric ``value_clip_fraction`` as a (sum, count) pair.
    """
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    loss = (values - returns).square()
    limited = torch.zeros_like(mask)
    if clip is not None:
        # Inside its bounds a clamp gives the value itself: adding a difference to old_values would round it.
        clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
        limited = clipped > loss
        loss = torch.maximum(loss, clipped)
    return 0.5 * reduced(loss, mask, reduction), {"value_clip_fraction": _fraction(limited, mask)}


def _clipped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip: Clip) -> Surrogate:
    mask = mask.bool()
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    free = -ratio * advantages
    bounded = -ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantages
    loss, clipped = torch.maximum(free, bounded), bounded > free
    if clip.dual is not None:
        most = -clip.dual * advantages
        beyond = (advantages < 0) & (loss > most)
        loss, clipped = torch.where(beyond, most, loss), clipped | beyond
    return Surrogate(torch.where(mask, loss, 0.0), clipped, log_ratio)


def _log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.where(mask.bool(), log_probs - old_log_probs, 0.0)
    return ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _fraction(condition: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often ``condition`` holds on actions, and how many actions there are."""
    return (condition & mask).sum(), mask.sum()
