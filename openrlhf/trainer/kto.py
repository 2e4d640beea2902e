"""Kahneman-Tversky optimisation: desirable answers should become likelier than the policy drifts, others less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.datasets.batch import UnpairedBatch
from openrlhf.ops.masking import masked_sum
from openrlhf.ops.preference_loss import kto_loss
from openrlhf.trainer.frozen import answer_log_probs
from openrlhf.trainer.known import KnownAnswers, Reference, answer_keys
from openrlhf.trainer.loop import StepOutput, Trainer
from openrlhf.trainer.metrics import Mean, MetricSums, divergence
from openrlhf.trainer.mismatched import Mismatched, partners
from openrlhf.trainer.sampling import in_order

Asked = tuple[UnpairedBatch, Tensor, bool]
"""Mismatched rows, what the reference says of them, and whether they are more than a dummy."""


class KTOTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on answers that are desirable or not.

    The drift is the mean log-ratio of policy and reference over mismatched rows, the prompt of one with the answer of
    the next, not below 0. It is taken over all rows of an optimizer step (in an evaluation over all of its rows)
    before any loss, so it does not depend on how they are cut into micro-batches.

    Attributes:
        drift: scalar, what was measured last.
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
        reference: Reference,
        beta: float,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ):
        """Take what :class:`Trainer` takes, and what the reference says of a batch."""
        super().__init__(*args, **kwargs)
        self._reference, self._beta = reference, beta
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self._answer_loss = partial(kto_loss, beta=beta, **weights)
        # Of the rows of a step it may have been asked with their mismatched rows.
        self._reference_of_rows = reference
        self.drift = torch.zeros((), device=self.strategy.device)

    def weight(self, batch: UnpairedBatch) -> Tensor:
        """Return the number of answers."""
        return torch.full((), len(batch.desirable), device=batch.desirable.device)

    def before_step(self, micros: list[list[int]], stoppable: bool) -> None:
        """Measure the drift over the step."""
        step = [row for found in self.comm.all_gather_object(micros) for micro in found for row in micro]
        self._measure_drift(self.train_data, step, micros, stoppable)

    def measure(self, data: Any, n_rows: int, stoppable: bool = False) -> dict[str, Mean]:
        """Return the metrics of the first ``n_rows`` of ``data``, whose drift is measured first."""
        micros = [micro for step in in_order(data, n_rows, self.batch, self.strategy).epoch(0) for micro in step]
        self._measure_drift(data, range(n_rows), micros, stoppable)
        return super().measure(data, n_rows, stoppable)

    @torch.no_grad()
    def _measure_drift(self, data: Any, rows: Sequence[int], micros: Sequence[list[int]], stoppable: bool) -> None:
        """Set the drift to the mean over the mismatched rows of ``rows``; ``micros`` are those of this rank."""
        mismatched, sums = Mismatched(data, partners(rows, len(data))), MetricSums()
        asked = self._asked_apart if self.batch.use_dynamic_batch else self._asked_together
        self.engine.eval()
        for batch, said, counted in asked(data, mismatched, micros):
            if stoppable:
                self.leave_if_asked()
            drift = answer_log_probs(self.engine, batch) - said
            sums.add({"drift": (drift.double().sum(), self.weight(batch))}, counted=self._counts and counted)
        self.engine.train()
        self.drift = divergence(sums.reduce(self.comm)["drift"], self.strategy.device)

    def _asked_together(self, data: Any, mismatched: Mismatched, micros: Sequence[list[int]]) -> Iterator[Asked]:
        """Ask the reference about rows and their mismatched rows at once: they share their prompts.

        What it says of the rows is remembered for their losses.
        """
        parts = []
        for micro in micros:
            rows, others = [data[row] for row in micro], [mismatched.of(row) for row in micro]
            both = data.collate(rows + others).to(self.strategy.device)
            said = self._reference(both)
            parts.append((answer_keys(both)[: len(rows)], said[: len(rows)].float().cpu().numpy()))
            yield data.collate(others).to(self.strategy.device), said[len(rows) :], bool(micro)
        self._reference_of_rows = KnownAnswers.of(parts)

    def _asked_apart(self, data: Any, mismatched: Mismatched, micros: Sequence[list[int]]) -> Iterator[Asked]:
        """Ask about the mismatched rows alone, in micro-batches that keep to the budget of tokens by themselves."""
        for step in in_order(mismatched, len(mismatched), self.batch, self.strategy).epoch(0):
            for micro in step:
                batch = mismatched.collate([mismatched[place] for place in micro]).to(self.strategy.device)
                yield batch, self._reference(batch), bool(micro)

    def compute_loss(self, batch: UnpairedBatch) -> StepOutput:
        """Return the loss over the answers, against the drift that was measured last."""
        reference = self._reference_of_rows(batch)
        output = self.engine(batch.sequences, batch.attention_mask, where=batch.loss_mask)
        log_ratios = masked_sum(output.log_probs, batch.loss_mask, dim=1) - reference
        loss, answers = self._answer_loss(log_ratios, batch.desirable, self.drift), self.weight(batch)
        rewards = self._beta * log_ratios.detach()
        metrics = {
            "kto_loss": (loss, answers),
            "chosen_reward": (masked_sum(rewards, batch.desirable), batch.desirable.sum()),
            "reject_reward": (masked_sum(rewards, ~batch.desirable), (~batch.desirable).sum()),
            "kl": (self.drift * answers, answers),
        }
        return StepOutput(loss, output.aux_loss, metrics)

    def train_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return the means of a step; a step without desirable answers, or without others, has no such reward."""
        return {name: mean.value for name, mean in totals.items() if mean.count}

    def eval_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return loss and rewards, but for a kind of answer that there is none of."""
        return {name: totals[metric].value for metric, name in self.eval_names.items() if totals[metric].count}
