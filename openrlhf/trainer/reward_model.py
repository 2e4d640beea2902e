"""Reward model training: the chosen answer of a pair should score higher than the rejected one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.datasets.batch import PreferenceBatch
from openrlhf.ops.preference_loss import log_exp_loss, pairwise_loss
from openrlhf.trainer.loop import StepOutput, Trainer
from openrlhf.trainer.metrics import Mean

LOG = logging.getLogger(__name__)
CALIBRATION_PAIRS = 512


class RewardModelTrainer(Trainer):
    """Trains a :class:`~openrlhf.models.value_head.ValueModel` on pairs, and measures the scale of its rewards.

    The mean and the unbiased standard deviation of all rewards of an evaluation go into the model's config as ``mean``
    and ``std``, where ``--normalize_reward`` finds them; every export has those of its own weights. Without evaluation
    rows training pairs stand in.
    """

    window_names: ClassVar = {"loss": "loss_mean", "acc": "acc_mean"}
    eval_names: ClassVar = {"loss": "eval_loss", "acc": "acc_mean"}
    best_metric: ClassVar = ("acc_mean", True)

    def __init__(self, *args: Any, loss: str = "sigmoid", margin_loss: bool = False, **kwargs: Any):
        """Take what :class:`Trainer` takes; a ``loss`` other than ``"sigmoid"`` is the log-exp loss."""
        super().__init__(*args, **kwargs)
        self._sigmoid, self._margin_loss = loss == "sigmoid", margin_loss
        self._measured_at: int | None = None

    def weight(self, batch: PreferenceBatch) -> Tensor:
        """Return the number of pairs."""
        return torch.full((), len(batch.margin), device=batch.margin.device)

    def compute_loss(self, batch: PreferenceBatch) -> StepOutput:
        """Return the pairwise loss, in float32; both sides of a pair go through the model in one forward."""
        rewards, aux_loss = self.engine(batch.sequences, batch.attention_mask, read="last", with_aux_loss=True)
        chosen, rejected = rewards.chunk(2)
        if self._sigmoid:
            loss = pairwise_loss(chosen, rejected, batch.margin if self._margin_loss else None)
        else:
            loss = log_exp_loss(chosen, rejected)
        pairs = self.weight(batch)
        metrics = {
            "loss": (loss, pairs),
            "acc": ((chosen > rejected).sum(), pairs),
            "chosen_reward": (chosen.detach().double().sum(), pairs),
            "reject_reward": (rejected.detach().double().sum(), pairs),
            "reward_square": (rewards.detach().double().square().sum(), 2 * pairs),
        }
        return StepOutput(loss, aux_loss, metrics)

    def train_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return the means of a step but that of the squares, which only evaluation needs."""
        return {name: mean.value for name, mean in totals.items() if name != "reward_square"}

    def eval_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return loss, pair accuracy, and mean and deviation of the rewards; they also go into the model's config."""
        mean, std = reward_scale(totals)
        self.engine.module.config.mean, self.engine.module.config.std = mean, std
        self._measured_at = self.global_step
        return {**super().eval_values(totals), "reward_mean": mean, "reward_std": std}

    def before_export(self) -> None:
        """Measure the scale of the rewards, unless that was done with the present weights."""
        if self._measured_at == self.global_step:
            return
        data, pairs = self.eval_data, len(self.eval_data)
        if not pairs:
            data, pairs = self.train_data, min(CALIBRATION_PAIRS, len(self.train_data))
            LOG.info("no rows to evaluate: mean and std of the rewards come from %d training pairs", pairs)
        self.eval_values(self.measure(data, pairs))


def reward_scale(totals: Mapping[str, Mean]) -> tuple[float, float]:
    """Return the mean and the unbiased standard deviation of chosen and rejected rewards together.

    ``totals`` holds ``chosen_reward``, ``reject_reward`` and ``reward_square``. Fewer than two rewards, or equal ones,
    give a deviation of 1, so that normalising stays possible.
    """
    squares, count = totals["reward_square"]
    mean = (totals["chosen_reward"].total + totals["reject_reward"].total) / count
    variance = max(0.0, squares - count * mean**2) / max(1.0, count - 1)
    return mean, math.sqrt(variance) or 1.0
