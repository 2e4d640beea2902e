"""The supervised loop, written once. An algorithm says what a batch weighs and what its loss is; the rest is here.

One optimizer step reads a list of micro-batches a rank. Their weights (loss tokens, pairs) are added over the step and
over all ranks before the first backward, and every loss is a sum divided by that number: the gradient does not depend
on how the batch was cut. What happens between steps (progress, logs, evaluation, checkpoints) is for callbacks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from openrlhf import device as machine
from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.errors import DataError, Preempted
from openrlhf.strategy import signals
from openrlhf.strategy.deepspeed import DeepSpeedStrategy, TrainEngine
from openrlhf.strategy.rng import rewound_when_stopped
from openrlhf.trainer.callbacks import Callback, Callbacks
from openrlhf.trainer.continuity import check_position
from openrlhf.trainer.finite import StepGuard
from openrlhf.trainer.metrics import Mean, MeanWindow, MetricSums
from openrlhf.trainer.sampling import in_order, sampler_of

LONG_STEP_S = 2.0
"""A step that takes longer is left between its micro-batches when the run is asked to stop."""


class StepOutput(NamedTuple):
    """What an algorithm makes of one micro-batch.

    Attributes:
        loss_sum: scalar, the loss summed over the batch's weight.
        aux_loss: scalar, already times its coefficient; averaged over micro-batches.
        metrics: name -> ``(sum, count)``, both scalars.
    """

    loss_sum: Tensor
    aux_loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass
class Position:
    """Where a run stands: the next step is step ``step`` of ``epoch``, both counted from 0.

    ``evaluating``: the evaluation after the last step was begun and not finished. ``consumed_samples`` tells whoever
    reads a checkpoint how many rows the run has learned from.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    consumed_samples: int = 0
    evaluating: bool = False


def total_steps(rows: int, batch: BatchConfig) -> int:
    """Return the optimizer steps of a run over ``rows``; the last step of an epoch may be short."""
    return batch.max_epochs * math.ceil(rows / batch.train_batch_size)


class Trainer:
    """The supervised loop. Subclasses give :meth:`weight` and :meth:`compute_loss`, and name their metrics.

    ``window_names`` maps a metric to the name of its mean since the last log line, ``eval_names`` to its name in an
    evaluation. ``best_metric`` is the figure of an evaluation that says which step was best, and whether higher is
    better.
    """

    window_names: ClassVar[Mapping[str, str]] = {"loss": "loss_mean"}
    eval_names: ClassVar[Mapping[str, str]] = {"loss": "eval_loss"}
    best_metric: ClassVar[tuple[str, bool]] = ("eval_loss", False)

    def __init__(
        self,
        engine: TrainEngine,
        strategy: DeepSpeedStrategy,
        train_data: Any,
        eval_data: Any,
        batch: BatchConfig,
        callbacks: Sequence[Callback] = (),
    ):
        """``train_data`` and ``eval_data`` have a length, items and ``collate(items)``; no eval rows is fine."""
        self.engine, self.strategy, self.comm = engine, strategy, strategy.comm
        self.train_data, self.eval_data, self.batch = train_data, eval_data, batch
        # The ranks of a ring compute the same numbers.
        self._counts = strategy.ring.rank == 0
        if batch.use_dynamic_batch:
            engine.module.insist_on_packing("--use_dynamic_batch")
        self.sampler = sampler_of(
            batch, strategy, len(train_data), batch.train_batch_size, lengths=getattr(train_data, "lengths", None)
        )
        self.callbacks = Callbacks(callbacks)
        self.window = MeanWindow(self.window_names)
        self.position = Position()
        noun = "training rows {} (counted from 0, after filtering)"
        self.guard = StepGuard(engine, self.comm, batch.max_skipped_steps, noun)
        self._step_seconds = math.inf

    def weight(self, batch) -> Tensor:
        """Return what the loss of ``batch`` is divided by, e.g. its loss tokens or pairs, as a scalar tensor."""
        raise NotImplementedError

    def compute_loss(self, batch) -> StepOutput:
        """Return the loss of one micro-batch; evaluation calls it too, without gradients."""
        raise NotImplementedError

    def before_step(self, micros: list[list[int]], stoppable: bool) -> None:
        """Measure what the losses of a step need, before the first of them; most algorithms need nothing.

        ``micros``: numbers of the rows of each micro-batch of this rank. ``stoppable``: the step may take long and is
        left when the run is asked to stop.
        """

    def before_export(self) -> None:
        """Bring up to date what an export holds beside the weights; called before each, and after the last step."""

    def train_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return what a training step logs of its metrics."""
        return {name: mean.value for name, mean in totals.items()}

    def eval_values(self, totals: Mapping[str, Mean]) -> dict[str, float]:
        """Return what an evaluation logs."""
        return {name: totals[metric].value for metric, name in self.eval_names.items()}

    @property
    def global_step(self) -> int:
        """Optimizer steps done since the run began."""
        return self.position.global_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.sampler.steps_per_epoch

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(len(self.train_data), self.batch)

    @property
    def max_epochs(self) -> int:
        """Passes over the data."""
        return self.batch.max_epochs

    @property
    def epoch(self) -> int:
        """The epoch, counted from 1, of the step that was done last."""
        return max(0, self.global_step - 1) // self.steps_per_epoch + 1

    @property
    def epoch_ended(self) -> bool:
        """Whether the step that was done last was the last of an epoch."""
        return self.global_step % self.steps_per_epoch == 0

    @property
    def evaluating(self) -> bool:
        """Whether the evaluation after the last step was begun and not finished."""
        return self.position.evaluating

    @final
    def fit(self) -> None:
        """Train from the present position, which a checkpoint may have set, to the end of the last epoch.

        Raises ``Preempted`` on all ranks when one was asked to stop; the last whole step is saved then.
        """
        with signals.interruptible():
            self.callbacks.restore(self)
        with signals.held(), self.saved_when_stopped():
            self.callbacks.on_start(self)
            self.engine.train()
            if self.evaluating:
                self.evaluate()
            for epoch in range(self.position.epoch, self.batch.max_epochs):
                for micros in self.sampler.epoch(epoch, start_step=self.position.step):
                    metrics = self._train_step(micros)
                    self.callbacks.on_step_end(self, metrics)
            self.leave_if_asked()
            self.before_export()
            self.callbacks.on_end(self)

    def leave_if_asked(self) -> None:
        """Raise ``Preempted`` on all ranks when one was asked to stop."""
        if signals.agreed(self.comm):
            raise Preempted("asked to stop")

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save what would be lost when the block is left by ``Preempted``, and say how to go on."""
        try:
            yield
        except Preempted:
            how = self.callbacks.on_stop(self)
            raise Preempted(f"stopped by {signals.requested()} after step {self.global_step}; {how}") from None

    def evaluate(self) -> dict[str, float]:
        """Return the metrics over all evaluation rows, and tell the callbacks."""
        self.position.evaluating = True
        values = self.eval_values(self.measure(self.eval_data, len(self.eval_data), stoppable=True))
        self.position.evaluating = False
        self.callbacks.on_evaluate(self, values)
        return values

    @torch.no_grad()
    def measure(self, data: Any, n_rows: int, stoppable: bool = False) -> dict[str, Mean]:
        """Return the metrics of the first ``n_rows`` of ``data``, over all ranks, in evaluation mode.

        ``stoppable``: it is left half done when the run is asked to stop.
        """
        sums = MetricSums()
        self.engine.eval()
        for step in in_order(data, n_rows, self.batch, self.strategy).epoch(0):
            if stoppable:
                self.leave_if_asked()
            for micro in step:
                sums.add(self.compute_loss(self._collate(data, micro)).metrics, counted=self._counts and bool(micro))
        self.engine.train()
        return sums.reduce(self.comm)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's position and what it must agree with, for JSON."""
        return {
            "position": asdict(self.position),
            "window": self.window.state_dict(),
            "callbacks": self.callbacks.state_dict(),
            "data": self._data_facts(),
        }

    def load_state_dict(self, state: Mapping[str, Any], allow_change: bool = False) -> None:
        """Take up a saved position; raise UsageError when it counts steps of other data or batches.

        ``allow_change`` lets the data and the flags be others, as long as an epoch has as many steps.
        """
        check_position(state["data"], self._data_facts(), "--dataset", allow_change)
        self.position = Position(**state["position"])
        self.position.evaluating &= bool(len(self.eval_data))
        self.window.load_state_dict(state["window"])
        self.callbacks.load_state_dict(state.get("callbacks", {}))

    def _data_facts(self) -> dict[str, Any]:
        """Return what a position means nothing without, beside the flags: the data and its number of steps."""
        return {
            "rows": len(self.train_data),
            "data": self._fingerprint,
            "steps_per_epoch": self.steps_per_epoch,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.train_data)

    def _collate(self, data: Any, rows: list[int]):
        return data.collate([data[row] for row in rows]).to(self.strategy.device)

    def _train_step(self, micros: list[list[int]]) -> dict[str, float]:
        """Train on this rank's micro-batches, lists of row numbers; return the metrics of the step over all ranks."""
        began = time.perf_counter()
        with rewound_when_stopped():
            totals, losses, again = self._accumulate(micros)
        tokens = totals.pop("tokens").total
        result = self.guard.step(f"step {self.global_step + 1}", micros, losses, again)
        self._advance()
        self._step_seconds = time.perf_counter() - began
        pace = {"tokens_per_second": tokens / self._step_seconds, "time/step": self._step_seconds}
        pace |= machine.memory_metrics()
        if result is None:
            return {"skipped_steps": 1.0, "lr": self.engine.lr, **pace}
        step = {"lr": result.lr, "grad_norm": result.grad_norm}
        return {**self.train_values(totals), **self.window.add(totals), **step, **pace}

    def _accumulate(self, micros: list[list[int]]) -> tuple[dict[str, Mean], list[Tensor], list[Callable[[], Tensor]]]:
        """Add up the gradients of a step.

        Return its metrics over all ranks, the losses of this rank, and what computes each of them again.
        """
        batches = [self._collate(self.train_data, micro) for micro in micros]
        weight, micro_batches, is_long = self._agree_on_step(micros, batches)
        self.before_step(micros, is_long)
        # Of an auxiliary loss each rank of a ring has that of its own tokens.
        share = weight / micro_batches / self.strategy.ring.size
        sums, losses = MetricSums(), []
        for micro, batch in zip(micros, batches, strict=True):
            if is_long:
                self.leave_if_asked()
            loss, metrics = self._loss(micro, batch, share)
            self.engine.backward(loss, weight)
            losses.append(loss.detach())
            tokens = batch.attention_mask.sum()
            sums.add({**metrics, "tokens": (tokens, tokens)}, counted=self._counts and bool(micro))
        again = [partial(self._loss_alone, *pair, share) for pair in zip(micros, batches, strict=True)]
        return sums.reduce(self.comm), losses, again

    def _loss(self, micro: list[int], batch: Any, aux_weight: float) -> tuple[Tensor, dict]:
        """Return the loss of a micro-batch, to be divided by the step's weight, and its metrics.

        A rank without rows works on a dummy row, so that all ranks run the same collectives.
        """
        output = self.compute_loss(batch)
        loss = output.loss_sum + output.aux_loss * aux_weight
        metrics = dict(output.metrics)
        if output.aux_loss.requires_grad:
            metrics["aux_loss"] = (output.aux_loss.detach(), torch.ones((), device=loss.device))
        return loss if micro else loss * 0.0, metrics

    def _loss_alone(self, *arguments: Any) -> Tensor:
        return self._loss(*arguments)[0]

    def _agree_on_step(self, micros: list[list[int]], batches: list) -> tuple[float, float, bool]:
        """Return the weight of the step over all ranks, its micro-batches with rows, and whether it may take long.

        The same sum tells whether a rank was asked to stop: asking costs nothing.
        """
        weights = [self.weight(batch) for micro, batch in zip(micros, batches, strict=True) if micro]
        total = torch.zeros(4, dtype=torch.float64, device=self.strategy.device)
        if weights and self._counts:
            total[0], total[1] = torch.stack(weights).sum(), len(weights)
        total[2], total[3] = signals.requested() is not None, self._step_seconds > LONG_STEP_S
        weight, micro_batches, asked, long = self.comm.all_reduce(total).tolist()
        if asked:
            signals.ask(signals.ELSEWHERE)
            raise Preempted("asked to stop")
        if weight == 0:
            raise DataError(f"step {self.global_step + 1}: none of its rows has anything to learn from")
        return weight, micro_batches, long > 0

    def _advance(self) -> None:
        here = self.position
        here.global_step += 1
        here.step += 1
        here.consumed_samples = here.epoch * len(self.train_data) + min(
            here.step * self.batch.train_batch_size, len(self.train_data)
        )
        if here.step == self.steps_per_epoch:
            here.epoch, here.step = here.epoch + 1, 0
