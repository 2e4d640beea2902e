"""What the roles of PPO share: forwards in micro-batches, and the optimizer steps of a role that learns.

A worker is one rank of its role. Its methods take and return one item a shard of the rollout; a
:class:`~openrlhf.trainer.ppo.groups.WorkerGroup` deals the shards out. Forwards run in micro-batches of
``--micro_rollout_batch_size`` rows, updates in micro-batches of ``--micro_train_batch_size``; with
``--use_dynamic_batch`` both have a budget of tokens instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.device import empty_cache
from openrlhf.errors import NumericError
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.ops.policy_loss import weight
from openrlhf.rollout.types import Experience, SequenceBatch
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import StepResult
from openrlhf.strategy.rng import load_rng, save_rng
from openrlhf.strategy.room import checkpoint_bytes
from openrlhf.trainer.finite import StepGuard
from openrlhf.trainer.loop import StepOutput
from openrlhf.trainer.metrics import MetricSums
from openrlhf.trainer.ppo.buffer import Batch, ExperienceBuffer, blank_sequences, cut
from openrlhf.trainer.profiling import Recorder

Means = dict[str, float]


class Worker:
    """What every role shares: the configuration, the ranks, and forwards cut into micro-batches."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy):
        self.config = config
        self.strategy = strategy
        self.comm = strategy.comm
        self.tokenizer = load_tokenizer(
            config.model.pretrain,
            use_fast=not config.model.disable_fast_tokenizer,
            trust_remote_code=config.model.trust_remote_code,
            chat_template=config.prompts.tokenizer_chat_template,
        )
        self._recorder = Recorder()

    def start_recording(self) -> None:
        """Begin to record what this process does, for ``--profile_steps``."""
        self._recorder.start()

    def stop_recording(self, *, folder: str, number: int) -> None:
        """Write the record of this process to ``folder``; ``number`` tells the groups of workers apart."""
        role = type(self).__name__.removesuffix("Worker").lower()
        self._recorder.stop(folder, f"{number}.{role}.rank{self.comm.rank}")

    @torch.no_grad()
    def _forward(self, batches: list[SequenceBatch], compute: Callable[[SequenceBatch], Tensor]) -> list[Tensor]:
        """Return ``compute`` of every row of ``batches`` on the CPU: ``(B, T)`` or ``(B,)`` float32 for each batch.

        All ranks call ``compute`` equally often, because the layers of a sharded model are gathered together.
        """
        ring, own = self.strategy.ring, len(batches)
        batches = self._of_ring(batches)
        size, budget = self.config.rollout.micro_rollout_batch_size, self.config.scoring_budget
        pieces = [
            (index, rows)
            for index, batch in enumerate(batches)
            for rows in cut(batch, list(range(len(batch))), size, budget and budget * ring.size)
        ]
        # Agreed on before the first: while one rank asked, another would wait for it in a forward.
        idle = round(self.comm.all_reduce(float(len(pieces)), op="max")) - len(pieces)
        outputs: list[list[Tensor]] = [[] for _ in batches]
        order: list[list[int]] = [[] for _ in batches]
        for index, rows in pieces:
            result = compute(batches[index].select(rows).to(self.strategy.device)).float().cpu()
            outputs[index].append(_widen(result, batches[index]))
            order[index] += rows
        for _ in range(idle):
            compute(blank_sequences().to(self.strategy.device))
        found = [_in_order(parts, rows) for parts, rows in zip(outputs, order, strict=True)]
        return found[ring.rank * own : (ring.rank + 1) * own]

    def _of_ring(self, shards: list[Batch]) -> list[Batch]:
        """Return the shards of all ranks of the ring, which compute on them together; alone, those of this rank."""
        with self.comm.waiting("sharing the samples of a ring"):
            return self.strategy.ring.gather(shards)

    @property
    def _counts(self) -> bool:
        """Whether this rank speaks for its ring, whose ranks compute the same numbers."""
        return self.strategy.ring.rank == 0


def _in_order(parts: list[Tensor], rows: list[int]) -> Tensor:
    """Return the results of a batch, of which ``parts`` holds those of ``rows``, in the order of the batch."""
    if not parts:
        return torch.zeros(0, 1)
    return torch.cat(parts)[torch.tensor(rows).argsort()]


def _widen(result: Tensor, batch: SequenceBatch) -> Tensor:
    """Return ``(b, t)`` padded on the right with zeros to the width of ``batch``; ``(b,)`` as it is."""
    if result.dim() == 1:
        return result
    return torch.nn.functional.pad(result, (0, batch.action_mask.shape[1] - result.shape[1]))


class TrainedWorker(Worker):
    """A role that learns. Subclasses give :meth:`loss` and build :attr:`engine`.

    Attributes:
        engine: the :class:`~openrlhf.strategy.deepspeed.TrainEngine` of the model.
    """

    engine: Any

    @property
    def reduction(self) -> str:
        """What the loss is a mean of: ``"token"`` or ``"sequence"``."""
        return self.config.algorithm.loss_reduction

    def loss(self, batch: Experience, whiten: tuple[float, float] | None) -> StepOutput:
        """Return the loss summed over the actions, or sequences, the load-balancing loss, and metrics."""
        raise NotImplementedError

    def learn_beside(self) -> MetricSums:
        """Add the gradients of a further loss to those of a step, before it is taken; return the metrics."""
        return MetricSums()

    def look_beside(self, error: NumericError) -> None:
        """Raise NumericError when it was the further loss that spoilt a step, which failed with ``error``."""

    def after_step(self) -> None:
        """Called after every optimizer step."""

    @property
    def _rests(self) -> bool:
        """Whether ``--deepspeed_enable_sleep`` has an effect here."""
        return self.config.optimizer_rests and self.strategy.device.type != "cpu"

    def rest(self) -> None:
        """Give device memory to others until the next update."""
        if self._rests:
            self.engine.rest()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Have the states of the optimizer on the device inside the block."""
        if self._rests:
            self.engine.resume()
        try:
            yield
        finally:
            self.rest()

    def update(
        self, experiences: list[Experience], *, rollout: int, whiten: tuple[float, float] | None = None
    ) -> Means:
        """Learn from the rollout in ``--max_epochs`` passes; return metrics over all ranks.

        Args:
            experiences: shards of this rank.
            rollout: number of the rollout step; with the run's seed it fixes the order of rows.
            whiten: mean and 1 / standard deviation of the advantages over all ranks, or None to take them as they are.
        """
        with self._at_work():
            return self._update(self._of_ring(experiences), rollout, whiten)

    def _update(self, experiences: list[Experience], rollout: int, whiten: tuple[float, float] | None) -> Means:
        buffer = ExperienceBuffer(experiences, self.comm, self.config.batch, rollout, self.strategy.ring.size)
        sums, norms, lr, skipped = MetricSums(), [], self.engine.lr, self.guard.skipped
        self.engine.train()
        for epoch in range(self.config.batch.max_epochs):
            for number, micro_batches in enumerate(buffer.epoch(epoch), start=epoch * buffer.steps + 1):
                result = self._optimizer_step(f"optimizer step {number}", micro_batches, whiten, sums)
                if result is not None:
                    norms.append(result.grad_norm)
                    lr = result.lr
        means = {name: mean.value for name, mean in sums.reduce(self.comm).items()}
        if self.config.batch.max_skipped_steps:
            means["skipped_steps"] = self.guard.skipped - skipped
        empty_cache()
        return {**means, "lr": lr, "grad_norm": sum(norms) / max(1, len(norms))}

    @cached_property
    def guard(self) -> StepGuard:
        """What keeps numbers that are not finite out of the weights."""
        return StepGuard(self.engine, self.comm, self.config.batch.max_skipped_steps, "samples {}")

    def _optimizer_step(
        self, name: str, micro_batches: list[Experience], whiten: tuple[float, float] | None, sums: MetricSums
    ) -> StepResult | None:
        """Take the step called ``name`` on the mean over the tokens, or the sequences, of all ranks.

        Return None when no rank has an action to learn from, or when the step was left out.
        """
        share = float(sum(int(weight(micro.action_mask, self.reduction)) for micro in micro_batches))
        filled = float(sum(bool((micro.sample >= 0).any()) for micro in micro_batches))
        counts = torch.tensor([share, filled], dtype=torch.float64, device=self.strategy.device) * self._counts
        whole, micros = self.comm.all_reduce(counts).tolist()
        if not whole:
            return None
        # Of an auxiliary loss each rank of a ring has that of its own tokens.
        aux_weight = whole / micros / self.strategy.ring.size
        losses, metrics = [], MetricSums()
        for micro in micro_batches:
            loss, found = self._whole_loss(micro, whiten, aux_weight)
            metrics.add(found, counted=self._counts)
            self.engine.backward(loss, whole)
            losses.append(loss.detach())
        metrics.join(self.learn_beside())
        samples = [[sample for sample in micro.sample.tolist() if sample >= 0] for micro in micro_batches]
        again = [lambda micro=micro: self._whole_loss(micro, whiten, aux_weight)[0] for micro in micro_batches]
        try:
            result = self.guard.step(name, samples, losses, again)
        except NumericError as error:
            self.look_beside(error)
            raise
        if result is not None:
            sums.join(metrics)
            self.after_step()
        return result

    def _whole_loss(
        self, micro: Experience, whiten: tuple[float, float] | None, aux_weight: float
    ) -> tuple[Tensor, dict]:
        """Return the loss of a micro-batch, to be divided by the step's weight, and its metrics."""
        output = self.loss(micro.to(self.strategy.device), whiten)
        if not output.aux_loss.requires_grad:
            return output.loss_sum, output.metrics
        # A rank without rows works on a blank one, whose routing is nobody's.
        filled = (micro.sample >= 0).any().to(output.aux_loss)
        metrics = {**output.metrics, "aux_loss": (output.aux_loss.detach() * filled, filled)}
        return output.loss_sum + output.aux_loss * filled * aux_weight, metrics

    def checkpoint_bytes(self) -> tuple[int, int]:
        """Return the bytes of a checkpoint of this role over all its ranks, and of an export."""
        return checkpoint_bytes(self.engine)

    def save(self, *, path: str) -> None:
        """Write what continues the training of this rank to folder ``path``; all ranks call it."""
        with self._at_work():
            self.engine.save(path)
        save_rng(Path(path), self.comm.rank)

    def load(self, *, path: str) -> None:
        """Continue from what :meth:`save` wrote. Raises DataError when files of this rank are missing."""
        with self._at_work():
            self.engine.load(path)
        load_rng(Path(path), self.comm.rank)
