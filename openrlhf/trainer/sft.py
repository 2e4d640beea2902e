"""Supervised fine-tuning: the mean negative log-likelihood of the answer tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from openrlhf.datasets.batch import TokenBatch
from openrlhf.ops.lm_loss import next_token_loss
from openrlhf.trainer.loop import StepOutput, Trainer


class SFTTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on the tokens that the data's loss mask marks."""

    window_names: ClassVar = {"gpt_loss": "loss_mean"}
    eval_names: ClassVar = {"gpt_loss": "eval gpt_loss"}
    best_metric: ClassVar = ("eval gpt_loss", False)

    def weight(self, batch: TokenBatch) -> Tensor:
        """Return the number of loss tokens."""
        return batch.loss_mask.sum()

    def compute_loss(self, batch: TokenBatch) -> StepOutput:
        """Return the next-token loss over the loss mask."""
        output = self.engine(batch.sequences, batch.attention_mask, where=batch.loss_mask)
        loss = next_token_loss(output.log_probs, batch.loss_mask)
        return StepOutput(loss, output.aux_loss, {"gpt_loss": (loss, batch.loss_mask.sum())})
