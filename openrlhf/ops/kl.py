"""Estimates of the KL divergence from the reference, and the coefficient that weighs it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def approx_kl(log_ratio: Tensor, estimator: str = "k1") -> Tensor:
    """Return a per-token estimate of ``KL(policy || reference)`` from tokens that the policy sampled.

    With ``d = log policy - log reference``, http://joschu.net/blog/kl-approx.html:

    * k1 is ``d``: no bias, may be negative; for the reward. As a loss its gradient is 0 on average.
    * k2 is ``d**2 / 2``: a little bias, never negative; as a loss its gradient is that of the divergence.
    * k3 is ``exp(-d) - 1 + d``: no bias, never negative, little noise; the loss of GRPO,
      https://arxiv.org/abs/2402.03300.

    Args:
        log_ratio: ``d``, any shape. k3 reads it within [-20, 20], where its exponential stays finite.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.

    Raises:
        ValueError: for any other estimator.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        bounded = log_ratio.clamp(-20.0, 20.0)
        return torch.expm1(-bounded) + bounded
    raise ValueError(f"unknown KL estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")


class FixedKLController:
    """A KL coefficient that stays what it is: the ordinary choice, whatever the divergence becomes."""

    def __init__(self, coef: float):
        self.value = coef

    def update(self, kl: float, n_steps: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keep the coefficient of this run: a fixed one is a setting, not a state."""


class AdaptiveKLController:
    """A KL coefficient steered so that the measured divergence comes near ``target``.

    ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * min(n_steps / horizon, 1)``: one update never moves it by more
    than a fifth. Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2: where a divergence is easier to
    name than a coefficient.

    Raises:
        ValueError: ``target`` or ``horizon`` is not positive.
    """

    def __init__(self, coef: float, target: float, horizon: int = 10000):
        if target <= 0 or horizon <= 0:
            raise ValueError(
                f"an adaptive KL coefficient needs target > 0 and horizon > 0, not {target} and {horizon}"
            )
        self.value = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n_steps: int) -> None:
        """Move the coefficient after ``n_steps`` samples whose mean divergence was ``kl``.

        Raises:
            ValueError: ``kl`` is not finite, which would spoil the coefficient for ever.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the measured KL is {kl}; the KL coefficient cannot follow it")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * min(n_steps / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from the coefficient of a checkpoint."""
        self.value = float(state["value"])
