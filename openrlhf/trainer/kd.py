"""Knowledge distillation: the negative log-likelihood of the answers, and the divergence from a teacher on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.datasets.batch import TokenBatch
from openrlhf.ops.lm_loss import distillation_loss, next_token_loss
from openrlhf.ops.masking import masked_sum
from openrlhf.trainer.loop import StepOutput, Trainer


class KDTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on what the data says and what a frozen teacher would say.

    ``loss = (1 - kd_coef) * gpt_loss + kd_coef * distil_loss``. ``distil_loss`` is the cross-entropy of teacher and
    student; ``kl`` is what is left of it without the entropy of the teacher, 0 when both agree.
    """

    window_names: ClassVar = {"gpt_loss": "loss_mean"}
    eval_names: ClassVar = {
        "loss": "eval_loss",
        "gpt_loss": "eval gpt_loss",
        "distil_loss": "eval distil_loss",
        "kl": "eval kl",
    }
    best_metric: ClassVar = ("eval_loss", False)

    def __init__(self, *args: Any, teacher: Callable[..., Any], kd_coef: float, **kwargs: Any):
        """Take what :class:`Trainer` takes, and the teacher, which reads the same token ids."""
        super().__init__(*args, **kwargs)
        self._teacher, self._kd_coef = teacher, kd_coef
        self._vocabulary = self.engine.module.config.get_text_config().vocab_size

    def weight(self, batch: TokenBatch) -> Tensor:
        """Return the number of loss tokens."""
        return batch.loss_mask.sum()

    def compute_loss(self, batch: TokenBatch) -> StepOutput:
        """Return both losses over the loss mask, mixed."""
        inputs, mask = (batch.sequences, batch.attention_mask), batch.loss_mask
        with torch.no_grad():
            taught = self._teacher(*inputs, where=mask, read="own_logits").logits[:, : self._vocabulary]
        output = self.engine(*inputs, where=mask, teacher_logits=taught)
        gpt = next_token_loss(output.log_probs, mask)
        distil = distillation_loss(output.cross_entropy, mask)
        kl = distil.detach() - masked_sum(output.teacher_entropy, mask)
        loss, tokens = (1.0 - self._kd_coef) * gpt + self._kd_coef * distil, mask.sum()
        sums = {"loss": loss, "gpt_loss": gpt, "distil_loss": distil, "kl": kl}
        return StepOutput(loss, output.aux_loss, {name: (total, tokens) for name, total in sums.items()})
