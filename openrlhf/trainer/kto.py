"""Kahneman-Tversky optimisation: desirable answers should become likelier than the policy drifts, others less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.batch import UnpairedBatch
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.datasets.sampler import StepSampler
from openrlhf.errors import DataError
from openrlhf.ops.masking import masked_sum
from openrlhf.ops.preference_loss import kto_loss
from openrlhf.trainer.frozen import answer_log_probs
from openrlhf.trainer.known import KnownAnswers, Reference, answer_keys
from openrlhf.trainer.loop import StepOutput, Trainer
from openrlhf.trainer.metrics import Mean, MetricSums, divergence
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


def partners(rows: Sequence[int], n_rows: int) -> np.ndarray:
    """Return ``(N, 2)``: each row of a step, or of an evaluation, in their order, and the one that lends its answer.

    That is the next of the same step, after the last the first. A step of one row borrows from the next of the
    ``n_rows`` of the data: with its own answer the row would not be mismatched.

    Raises:
        DataError: the data has no second row.
    """
    if n_rows < 2:
        raise DataError("KTO measures the drift of the policy on a prompt with the answer to another: give two rows")
    ordered = np.sort(np.asarray(rows, np.int64))
    lenders = np.roll(ordered, -1) if len(ordered) > 1 else (ordered + 1) % n_rows
    return np.stack([ordered, lenders], axis=1)


class Mismatched:
    """A data set of mismatched rows: the prompt of one row of ``data`` with the answer of another.

    ``pairs`` ``(N, 2)`` holds the numbers of both, in ascending order.
    """

    def __init__(self, data: Any, pairs: np.ndarray):
        self._data, self._pairs = data, pairs
        self.collate = data.collate

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Any:
        return self._data.mismatched(*self._pairs[index].tolist())

    def of(self, row: int) -> Any:
        """Return the first that has the prompt of ``row``."""
        return self[int(np.searchsorted(self._pairs[:, 0], row))]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        found = (self._data.mismatched_length(*pair) for pair in self._pairs.tolist())
        return np.fromiter(found, np.int64, len(self))

    @property
    def digest(self) -> str:
        """Changes with any row, and with their order and number."""
        return sha256(fingerprint(self._data).encode() + self._pairs.tobytes()).hexdigest()


def mismatched_sets(train: Any, evaluation: Any, batch: BatchConfig) -> list[Mismatched]:
    """Return the mismatched rows of all steps of a run, and of its evaluations."""
    sampler = StepSampler(len(train), batch.train_batch_size, batch.train_batch_size, batch.seed)
    steps = (step[0] for epoch in range(batch.max_epochs) for step in sampler.epoch(epoch))
    found = [Mismatched(train, np.unique(np.concatenate([partners(step, len(train)) for step in steps]), axis=0))]
    if len(evaluation):
        found.append(Mismatched(evaluation, partners(range(len(evaluation)), len(evaluation))))
    return found
