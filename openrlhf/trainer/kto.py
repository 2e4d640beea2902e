"""Kahneman-Tversky optimisation: desirable answers should become likelier than the policy drifts, others less."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.batch import UnpairedBatch
from openrlhf.datasets.sampler import StepSampler
from openrlhf.ops.masking import masked_sum
from openrlhf.ops.preference_loss import kto_loss
from openrlhf.trainer.frozen import KnownAnswers, Reference, answer_log_probs
from openrlhf.trainer.loop import StepOutput, Trainer
from openrlhf.trainer.metrics import Mean, MetricSums


class KTOTrainer(Trainer):
    """Trains an :class:`~openrlhf.models.actor.Actor` on answers that are desirable or not.

    The drift is the mean log-ratio of policy and reference over mismatched rows, the prompt of one with the answer of
    the next, not below 0. It is taken over all rows of an optimizer step (in an evaluation over all of its rows)
    before any loss, so it does not depend on how they are cut into micro-batches. The reference is asked about rows
    and mismatched rows at once, because they share their prompts.

    Attributes:
        drift: scalar, what was measured last.
        known: what the reference says of the rows that it was measured with.
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
        self.drift = torch.zeros((), device=self.strategy.device)
        self.known = KnownAnswers()

    def weight(self, batch: UnpairedBatch) -> Tensor:
        """Return the number of answers."""
        return torch.full((), len(batch.desirable), device=batch.desirable.device)

    def prepare(self, rows: list[list[int]]) -> None:
        """Measure the drift over the step: each row is paired with the next of the step by its number."""
        step = {row for found in self.comm.all_gather_object(rows) for micro in found for row in micro}
        self._measure_drift(self.train_data, rows, partners(step))

    def measure(self, data: Any, n_rows: int, leave: bool = False) -> dict[str, Mean]:
        """Return the metrics of the first ``n_rows`` of ``data``, whose drift is measured first."""
        micros = [micro for step in self._eval_sampler(data, n_rows).epoch(0) for micro in step]
        self._measure_drift(data, micros, partners(range(n_rows)), leave)
        return super().measure(data, n_rows, leave)

    @torch.no_grad()
    def _measure_drift(
        self, data: Any, micros: Sequence[list[int]], partner: Mapping[int, int], leave: bool = False
    ) -> None:
        """Set the drift to the mean over the mismatched rows of all ranks, and keep what the reference says."""
        self.known, sums = KnownAnswers(), MetricSums()
        self.engine.eval()
        for micro in micros:
            if leave:
                self.leave_if_asked()
            rows, mismatched = [data[row] for row in micro], [data.mismatched(row, partner[row]) for row in micro]
            both = data.collate(rows + mismatched).to(self.strategy.device)
            said = self._reference(both)
            self.known.keep(both, said)
            batch = data.collate(mismatched).to(self.strategy.device)
            drift = answer_log_probs(self.engine, batch) - said[len(rows) :]
            sums.add({"drift": (drift.double().sum(), self.weight(batch))}, counted=self._counts and bool(micro))
        self.engine.train()
        mean = sums.reduce(self.comm)["drift"].value
        # What is not finite must reach the loss: the step then stops before the weights change.
        self.drift = torch.tensor(max(0.0, mean) if math.isfinite(mean) else math.nan, device=self.strategy.device)

    def compute_loss(self, batch: UnpairedBatch) -> StepOutput:
        """Return the loss over the answers, against the drift that was measured last."""
        reference = self.known(batch)
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


def partners(rows: Iterable[int]) -> dict[int, int]:
    """Return for each row of a step, or of an evaluation, the next by its number: the one that lends its answer."""
    ordered = sorted(rows)
    return dict(zip(ordered, ordered[1:] + ordered[:1], strict=True))


class Mismatched:
    """A data set of mismatched rows: the prompt of one row of ``data`` with the answer of another."""

    def __init__(self, data: Any, pairs: Iterable[tuple[int, int]]):
        self._data, self._pairs = data, sorted(pairs)
        self.collate = data.collate

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Any:
        return self._data.mismatched(*self._pairs[index])


def mismatched_sets(train: Any, evaluation: Any, batch: BatchConfig) -> list[Mismatched]:
    """Return the mismatched rows of all steps of a run, and of its evaluations."""
    sampler = StepSampler(len(train), batch.train_batch_size, batch.train_batch_size, batch.seed)
    steps = (step[0] for epoch in range(batch.max_epochs) for step in sampler.epoch(epoch))
    pairs = {pair for step in steps for pair in partners(step).items()}
    found = [Mismatched(train, pairs)]
    if len(evaluation):
        found.append(Mismatched(evaluation, partners(range(len(evaluation))).items()))
    return found
