"""Process reward models: after every step of an answer the model says with a token whether the step is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.datasets.batch import ProcessRewardBatch
from openrlhf.ops.lm_loss import process_reward_loss
from openrlhf.trainer.loop import StepOutput, Trainer


class ProcessRewardModelTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on the labels of steps."""

    window_names: ClassVar = {"prm_loss": "loss_mean", "acc": "acc_mean"}
    eval_names: ClassVar = {"prm_loss": "eval prm_loss", "acc": "eval acc"}
    best_metric: ClassVar = ("eval prm_loss", False)

    def __init__(self, *args: Any, reward_ids: Sequence[int] | None = None, **kwargs: Any):
        """Take what :class:`Trainer` takes; ``reward_ids`` are the only tokens that a label can be, if not None."""
        super().__init__(*args, **kwargs)
        self._reward_ids = None if reward_ids is None else torch.tensor(reward_ids, device=self.strategy.device)

    def weight(self, batch: ProcessRewardBatch) -> Tensor:
        """Return the number of steps with a label."""
        return batch.loss_mask.sum()

    def compute_loss(self, batch: ProcessRewardBatch) -> StepOutput:
        """Return the cross-entropy of the labels."""
        mask = batch.loss_mask
        output = self.engine(batch.sequences, batch.attention_mask, where=mask, read="logits")
        loss, right = process_reward_loss(output.logits, batch.labels[mask], self._reward_ids)
        steps = mask.sum()
        return StepOutput(loss, output.aux_loss, {"prm_loss": (loss, steps), "acc": (right, steps)})
