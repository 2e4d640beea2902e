"""Direct preference optimisation: the policy should prefer the chosen answer more than its reference does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.datasets.batch import PreferenceBatch
from openrlhf.ops.masking import masked_sum
from openrlhf.trainer.frozen import answer_log_probs
from openrlhf.trainer.known import Reference
from openrlhf.trainer.loop import StepOutput, Trainer
from openrlhf.trainer.metrics import Mean, MetricSums, divergence
from openrlhf.trainer.sampling import in_order


class DPOTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on pairs with any loss of ``PAIR_LOSSES``.

    With a reference the loss reads log-ratios to it, summed over the tokens of an answer; without one, log-probs as
    means over them. The rewards that are logged are these, times ``beta``.

    A loss that needs the divergences of the policy on both kinds of answers gets their mean log-ratios over all pairs
    of an optimizer step, or of an evaluation, measured before it.
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
        measures_divergences: bool = False,
        **kwargs: Any,
    ):
        """Take what :class:`Trainer` takes, the loss of ``(chosen (B,), rejected (B,))``, and the reference's word.

        ``measures_divergences``: the loss takes ``chosen_kl`` and ``rejected_kl`` too.
        """
        super().__init__(*args, **kwargs)
        self._pair_loss, self._beta, self._nll_coef = pair_loss, beta, nll_loss_coef
        self._reference = reference
        self._measures_divergences = measures_divergences
        self._divergences: dict[str, Tensor] = {}

    def weight(self, batch: PreferenceBatch) -> Tensor:
        """Return the number of pairs."""
        return torch.full((), len(batch.margin), device=batch.margin.device)

    def before_step(self, micros: list[list[int]], stoppable: bool) -> None:
        """Measure the divergences over the step for a loss that needs them."""
        if self._measures_divergences:
            self._measure_divergences(self.train_data, micros, stoppable)

    def measure(self, data: Any, n_rows: int, stoppable: bool = False) -> dict[str, Mean]:
        """Return the metrics of the first ``n_rows`` of ``data``, whose divergences are measured first if need be."""
        if self._measures_divergences:
            steps = in_order(data, n_rows, self.batch, self.strategy).epoch(0)
            self._measure_divergences(data, [micro for step in steps for micro in step], stoppable)
        return super().measure(data, n_rows, stoppable)

    @torch.no_grad()
    def _measure_divergences(self, data: Any, micros: Sequence[list[int]], stoppable: bool) -> None:
        sums = MetricSums()
        self.engine.eval()
        for micro in micros:
            if stoppable:
                self.leave_if_asked()
            batch = self._collate(data, micro)
            sides = (answer_log_probs(self.engine, batch) - self._reference(batch)).double().chunk(2)
            both = zip(("chosen_kl", "rejected_kl"), sides, strict=True)
            measured = {name: (side.sum(), self.weight(batch)) for name, side in both}
            sums.add(measured, counted=self._counts and bool(micro))
        self.engine.train()
        means = sums.reduce(self.comm).items()
        self._divergences = {name: divergence(mean, self.strategy.device) for name, mean in means}

    def compute_loss(self, batch: PreferenceBatch) -> StepOutput:
        """Return the loss over the pairs; both sides of a pair go through the model in one forward."""
        reference = self._reference(batch) if self._reference else None
        output = self.engine(batch.sequences, batch.attention_mask, where=batch.loss_mask)
        sums = masked_sum(output.log_probs, batch.loss_mask, dim=1)
        means = sums / batch.loss_mask.sum(dim=1).clamp(min=1)
        scores = means if reference is None else sums - reference
        chosen, rejected = scores.chunk(2)
        loss, pairs = self._pair_loss(chosen, rejected, **self._divergences), self.weight(batch)
        metrics = {
            "acc": ((chosen > rejected).sum(), pairs),
            "chosen_reward": (self._beta * chosen.detach().sum(), pairs),
            "reject_reward": (self._beta * rejected.detach().sum(), pairs),
        }
        metrics |= {name: (value * pairs, pairs) for name, value in self._divergences.items()}
        if self._nll_coef:
            nll = -means.chunk(2)[0].sum()
            loss = loss + self._nll_coef * nll
            metrics["nll_loss"] = (nll, pairs)
        return StepOutput(loss, output.aux_loss, {"loss": (loss, pairs), **metrics})
