"""Direct preference optimisation: the policy should prefer the chosen answer more than its reference does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.datasets.batch import PreferenceBatch
from openrlhf.ops.masking import masked_sum
from openrlhf.trainer.frozen import Reference
from openrlhf.trainer.loop import StepOutput, Trainer


class DPOTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on pairs with any loss of ``PAIR_LOSSES``.

    With a reference the loss reads log-ratios to it, summed over the tokens of an answer; without one, log-probs as
    means over them. The rewards that are logged are these, times ``beta``.
    """

    window_names: ClassVar = {"loss": "loss_mean", "acc": "acc_mean"}
    eval_names: ClassVar = {"loss": "eval_loss", "acc": "acc_mean"}
    best_metric: ClassVar = ("eval_loss", False)

    def __init__(
        self,
        *args: Any,
        pair_loss: Callable[[Tensor, Tensor], Tensor],
        beta: float,
        reference: Reference | None = None,
        nll_loss_coef: float = 0.0,
        **kwargs: Any,
    ):
        """Take what :class:`Trainer` takes, the loss of ``(chosen (B,), rejected (B,))``, and the reference's word."""
        super().__init__(*args, **kwargs)
        self._pair_loss, self._beta, self._nll_coef = pair_loss, beta, nll_loss_coef
        self._reference = reference

    def weight(self, batch: PreferenceBatch) -> Tensor:
        """Return the number of pairs."""
        return torch.full((), len(batch.margin), device=batch.margin.device)

    def compute_loss(self, batch: PreferenceBatch) -> StepOutput:
        """Return the loss over the pairs; both sides of a pair go through the model in one forward."""
        reference = self._reference(batch) if self._reference else None
        output = self.engine(batch.sequences, batch.attention_mask, where=batch.loss_mask)
        sums = masked_sum(output.log_probs, batch.loss_mask, dim=1)
        means = sums / batch.loss_mask.sum(dim=1).clamp(min=1)
        scores = means if reference is None else sums - reference
        chosen, rejected = scores.chunk(2)
        loss, pairs = self._pair_loss(chosen, rejected), self.weight(batch)
        metrics = {
            "acc": ((chosen > rejected).sum(), pairs),
            "chosen_reward": (self._beta * chosen.detach().sum(), pairs),
            "reject_reward": (self._beta * rejected.detach().sum(), pairs),
        }
        if self._nll_coef:
            nll = -means.chunk(2)[0].sum()
            loss = loss + self._nll_coef * nll
            metrics["nll_loss"] = (nll, pairs)
        return StepOutput(loss, output.aux_loss, {"loss": (loss, pairs), **metrics})
