"""Kahneman-Tversky optimisation: desirable answers should become likelier than the policy drifts, others less."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.datasets.batch import UnpairedBatch
from openrlhf.ops.masking import masked_sum
from openrlhf.ops.preference_loss import kto_loss
from openrlhf.trainer.frozen import answer_log_probs
from openrlhf.trainer.loop import StepOutput, Trainer
from openrlhf.trainer.metrics import Mean


class KTOTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on answers that are desirable or not.

    The drift is the mean log-ratio of policy and reference over mismatched rows, the prompt of one with the answer of
    the next, not below 0. It is taken over all rows of an optimizer step (in an evaluation over all of its rows)
    before any loss, so it does not depend on how they are cut into micro-batches.
    """

    window_names: ClassVar = {"kto_loss": "loss_mean"}
    eval_names: ClassVar = {
        "kto_loss": "eval_loss",
        "chosen_reward": "chosen_reward",
        "reject_reward": "reject_reward",
    }

    def __init__(
        self,
        *args: Any,
        reference: Callable[..., Any],
        beta: float,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ):
        """Take what :class:`Trainer` takes, and the reference model."""
        super().__init__(*args, **kwargs)
        self._reference, self._beta = reference, beta
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self._answer_loss = partial(kto_loss, beta=beta, **weights)
        self._kl = torch.zeros((), device=self.strategy.device)

    def weight(self, batch: UnpairedBatch) -> Tensor:
        """Return the number of answers."""
        return torch.full((), len(batch.desirable), device=batch.desirable.device)

    def prepare(self, rows: list[list[int]]) -> None:
        """Measure the drift over the step: each row is paired with the next of the step by its number."""
        step = sorted({row for found in self.comm.all_gather_object(rows) for micro in found for row in micro})
        self._measure_drift(self.train_data, rows, dict(zip(step, step[1:] + step[:1], strict=True)))

    def measure(self, data: Any, n_rows: int, leave: bool = False) -> dict[str, Mean]:
        """Return the metrics of the first ``n_rows`` of ``data``, whose drift is measured first."""
        sampler = self._sampler(n_rows, self.batch.micro_train_batch_size * self.strategy.world_size, shuffle=False)
        micros = [micro for step in sampler.epoch(0) for micro in step]
        self._measure_drift(data, micros, {row: (row + 1) % n_rows for row in range(n_rows)}, leave)
        return super().measure(data, n_rows, leave)

    @torch.no_grad()
    def _measure_drift(
        self, data: Any, micros: Sequence[list[int]], partner: Mapping[int, int], leave: bool = False
    ) -> None:
        """Set the drift to the mean over the mismatched rows of all ranks."""
        total = torch.zeros(2, dtype=torch.float64, device=self.strategy.device)
        self.engine.eval()
        for micro in micros:
            if leave:
                self.leave_if_asked()
            batch = data.collate([data.mismatched(row, partner[row]) for row in micro]).to(self.strategy.device)
            drift = answer_log_probs(self.engine, batch) - answer_log_probs(self._reference, batch)
            if micro:
                total += torch.stack([drift.double().sum(), total.new_tensor(len(micro))])
        self.engine.train()
        summed, count = self.comm.all_reduce(total)
        self._kl = (summed / count).clamp(min=0).float()

    def compute_loss(self, batch: UnpairedBatch) -> StepOutput:
        """Return the loss over the answers, against the drift that was measured last."""
        output = self.engine(batch.sequences, batch.attention_mask, where=batch.loss_mask)
        log_ratios = masked_sum(output.log_probs, batch.loss_mask, dim=1) - answer_log_probs(self._reference, batch)
        loss, answers = self._answer_loss(log_ratios, batch.desirable, self._kl), self.weight(batch)
        rewards = self._beta * log_ratios.detach()
        metrics = {
            "kto_loss": (loss, answers),
            "chosen_reward": (masked_sum(rewards, batch.desirable), batch.desirable.sum()),
            "reject_reward": (masked_sum(rewards, ~batch.desirable), (~batch.desirable).sum()),
            "kl": (self._kl * answers, answers),
        }
        return StepOutput(loss, loss.new_zeros(()), metrics)

    def train_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return the means of a step; a step without desirable answers, or without others, has no such reward."""
        return {name: mean.value for name, mean in totals.items() if mean.count}

    def eval_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return loss and rewards, but for a kind of answer that there is none of."""
        return {name: totals[metric].value for metric, name in self.eval_names.items() if totals[metric].count}
