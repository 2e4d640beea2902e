"""The models of PPO, one class a role: policy, reference, critic, reward. They know a strategy, not Ray.

A worker is one rank of its role. Its methods take and return one item a shard of the rollout; a
:class:`~openrlhf.trainer.ppo.groups.WorkerGroup` deals the shards out. Forwards run in micro-batches of
``--micro_rollout_batch_size`` rows, updates in micro-batches of ``--micro_train_batch_size``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.device import empty_cache
from openrlhf.models.actor import ActorOutput
from openrlhf.models.adapters import parameter_counts, trained_names
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.ops.masking import masked_sum, masked_whiten
from openrlhf.ops.policy_loss import ppo_policy_loss, value_loss
from openrlhf.rollout.hf_engine import HFEngine
from openrlhf.rollout.types import Experience, Prompt, Rollout, SamplingParams, SequenceBatch
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import StepResult, merged_weights, named_weights
from openrlhf.strategy.export import export_model
from openrlhf.strategy.rng import load_rng, save_rng
from openrlhf.strategy.room import checkpoint_bytes
from openrlhf.trainer.finite import StepGuard
from openrlhf.trainer.loop import StepOutput
from openrlhf.trainer.metrics import MetricSums
from openrlhf.trainer.ppo.assembly import (
    add_statistics,
    close_with_eos,
    experience_statistics,
    make_experience,
    scoring_temperature,
)
from openrlhf.trainer.ppo.average import WeightAverage
from openrlhf.trainer.ppo.buffer import ExperienceBuffer, blank_sequences
from openrlhf.trainer.ppo.models import load_actor, load_critic, load_reward_model
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
        size = self.config.rollout.micro_rollout_batch_size
        pieces = [
            (index, list(range(start, min(start + size, len(batch)))))
            for index, batch in enumerate(batches)
            for start in range(0, len(batch), size)
        ]
        outputs: list[list[Tensor]] = [[] for _ in batches]
        for index, rows in pieces:
            result = compute(batches[index].select(rows).to(self.strategy.device)).float().cpu()
            outputs[index].append(_widen(result, batches[index]))
        for _ in range(round(self.comm.all_reduce(float(len(pieces)), op="max")) - len(pieces)):
            compute(blank_sequences().to(self.strategy.device))
        return [torch.cat(parts) if parts else torch.zeros(0, 1) for parts in outputs]


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

    def loss(self, batch: Experience, whiten: tuple[float, float] | None) -> StepOutput:
        """Return the loss summed over the actions of ``batch``, the load-balancing loss, and metrics."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def update(
        self, experiences: list[Experience], *, rollout: int, whiten: tuple[float, float] | None = None
    ) -> Means:
        """Learn from the rollout in ``--max_epochs`` passes; return metrics over all ranks.

        Args:
            experiences: shards of this rank.
            rollout: number of the rollout step; with the run's seed it fixes the order of rows.
            whiten: mean and 1 / standard deviation of the advantages over all ranks, or None to take them as they are.
        """
        buffer = ExperienceBuffer(experiences, self.comm, self.config.batch, rollout)
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
        """Take the step called ``name`` on the token mean over all ranks.

        Return None when no rank has an action to learn from, or when the step was left out.
        """
        tokens = float(sum(int(micro.action_mask.sum()) for micro in micro_batches))
        filled = float(sum(bool((micro.sample >= 0).any()) for micro in micro_batches))
        counts = torch.tensor([tokens, filled], dtype=torch.float64, device=self.strategy.device)
        weight, micros = self.comm.all_reduce(counts).tolist()
        if not weight:
            return None
        losses, metrics = [], MetricSums()
        for micro in micro_batches:
            loss, found = self._whole_loss(micro, whiten, weight / micros)
            metrics.add(found)
            self.engine.backward(loss, weight)
            losses.append(loss.detach())
        samples = [[sample for sample in micro.sample.tolist() if sample >= 0] for micro in micro_batches]
        again = [lambda micro=micro: self._whole_loss(micro, whiten, weight / micros)[0] for micro in micro_batches]
        result = self.guard.step(name, samples, losses, again)
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
        self.engine.save(path)
        save_rng(Path(path), self.comm.rank)

    def load(self, *, path: str) -> None:
        """Continue from what :meth:`save` wrote. Raises DataError when files of this rank are missing."""
        self.engine.load(path)
        load_rng(Path(path), self.comm.rank)


class PolicyWorker(TrainedWorker):
    """The policy: generates when there is no other engine, scores, assembles experiences, learns."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy, *, max_steps: int):
        super().__init__(config, strategy)
        self.actor = load_actor(config, strategy)
        self.engine = strategy.prepare_train(self.actor, config.optim.actor, max_steps)
        self.average = WeightAverage(config.algorithm.ema_beta) if config.algorithm.enable_ema else None
        if self.average:
            self.average.start(self._trained(), keep=self.comm.rank == 0)

    def parameters(self) -> tuple[int, int]:
        """Return the number of the policy's parameters, and of those that are trained."""
        return parameter_counts(self.actor)

    def log_probs(self, batches: list[SequenceBatch]) -> list[Tensor]:
        """Return the log-probs ``(B, T)`` of the actions at the rollout temperature."""
        self.engine.eval()
        return self._forward(batches, self._action_log_probs)

    def reference_log_probs(self, batches: list[SequenceBatch]) -> list[Tensor]:
        """Return the log-probs ``(B, T)`` of the policy without its adapter: those of the model it started from."""
        self.engine.eval()
        with self.actor.without_adapter():
            return self._forward(batches, self._action_log_probs)

    def assemble(
        self,
        batches: list[SequenceBatch],
        log_probs: list[Tensor],
        ref_log_probs: list[Tensor],
        values: list[Tensor | None],
        scores: list[Tensor],
        shaped: list[Tensor],
        *,
        kl_coef: float,
    ) -> list[Experience]:
        """Return experiences: KL, token rewards, advantages and returns of every shard.

        Args:
            batches: the sequences.
            log_probs: ``(B, T)`` of the policy.
            ref_log_probs: ``(B, T)`` of the reference, or of the policy when there is none.
            values: ``(B, T)`` of the critic, or None when there is none.
            scores: ``(B,)`` what the reward sources gave.
            shaped: ``(B,)`` the clipped scores after the group baseline: what is learned from.
            kl_coef: weight of the KL in the token rewards.
        """
        columns = zip(batches, log_probs, ref_log_probs, values, scores, shaped, strict=True)
        return [make_experience(self.config.algorithm, *column, kl_coef=kl_coef) for column in columns]

    def statistics(self, experiences: list[Experience]) -> dict[str, float]:
        """Return sums over the actions of this rank, for the driver to add up."""
        return add_statistics([experience_statistics(experience) for experience in experiences if len(experience)])

    def loss(self, batch: Experience, whiten: tuple[float, float] | None) -> StepOutput:
        """Return PPO's clipped loss summed over the actions."""
        mask = batch.action_mask
        output = self._read(batch)
        advantages = batch.advantages if whiten is None else masked_whiten(batch.advantages, mask, *whiten)
        loss, metrics = ppo_policy_loss(
            output.log_probs, batch.log_probs, advantages, mask, clip=self.config.algorithm.eps_clip
        )
        metrics = {"policy_loss": (loss.detach(), mask.sum()), **metrics}
        return StepOutput(loss, output.aux_loss, metrics)

    def _action_log_probs(self, batch: SequenceBatch) -> Tensor:
        return self._read(batch).log_probs

    def _read(self, batch: SequenceBatch) -> ActorOutput:
        return self.engine(
            batch.sequences,
            batch.attention_mask,
            temperature=scoring_temperature(self.config),
            where=batch.action_mask,
        )

    def after_step(self) -> None:
        """Follow the new weights with the moving average."""
        if self.average:
            self.average.follow(self._trained())

    def generate(
        self, prompts: list[list[Prompt]], *, sampling: SamplingParams, version: int = 0
    ) -> list[list[Rollout]]:
        """Sample answers with the policy itself: one list of rollouts for each list of prompts."""
        rollout = self.config.rollout
        engine = HFEngine(
            self.actor, self.tokenizer, rollout.micro_rollout_batch_size, version, max_len=rollout.max_model_len
        )
        return [engine.generate(part, sampling) if part else [] for part in prompts]

    def weight_buckets(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the weights as ``(Hugging Face name, whole CPU tensor)`` in lists of about ``bucket_bytes``.

        Adapters are merged into the weights that they belong to. All ranks must exhaust it; only rank 0 gets any.
        """
        bucket, size = [], 0
        for name, tensor in merged_weights(self.actor.model, self.strategy, wanted=self.comm.rank == 0):
            bucket.append((name, tensor))
            size += tensor.numel() * tensor.element_size()
            if size >= bucket_bytes:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that learn, whole, on rank 0: all of them, or the adapter's."""
        names = trained_names(self.actor.model) if self.actor.has_adapter else None
        return named_weights(self.actor.model, self.strategy, wanted=self.comm.rank == 0, only=names)

    def save(self, *, path: str) -> None:
        """Write the training state and the moving average; all ranks call it."""
        super().save(path=path)
        if self.average and self.comm.rank == 0:
            self.average.save(Path(path) / "ema.pt")

    def load(self, *, path: str) -> None:
        """Continue from what :meth:`save` wrote."""
        super().load(path=path)
        if self.average and self.comm.rank == 0:
            self.average.load(Path(path) / "ema.pt")

    def export(self, *, path: str) -> None:
        """Write the policy, or its moving average where there is one, as a Hugging Face folder; all ranks call it.

        Of a policy with an adapter that is the folder of the adapter.
        """
        average = self.average.swapped_into(self.actor.model, self.strategy) if self.average else nullcontext()
        with average:
            export_model(self.engine, self.strategy, path, self.tokenizer)


class CriticWorker(TrainedWorker):
    """The critic: the value of the state before every action."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy, *, max_steps: int):
        super().__init__(config, strategy)
        self.critic = load_critic(config, strategy, self.tokenizer.pad_token_id)
        self.engine = strategy.prepare_train(self.critic, config.optim.critic, max_steps)

    def values(self, batches: list[SequenceBatch]) -> list[Tensor]:
        """Return the values ``(B, T)`` of the states before the tokens."""
        self.engine.eval()
        return self._forward(batches, self._values)

    def _values(self, batch: SequenceBatch) -> Tensor:
        return self.engine(batch.sequences, batch.attention_mask, read="each")[:, :-1]

    def loss(self, batch: Experience, whiten: tuple[float, float] | None) -> StepOutput:
        """Return the clipped squared error summed over the actions."""
        mask = batch.action_mask
        found, aux_loss = self.engine(batch.sequences, batch.attention_mask, read="each", with_aux_loss=True)
        values = found[:, :-1]
        loss, metrics = value_loss(values, batch.values, batch.returns, mask, clip=self.config.algorithm.value_clip)
        count = mask.sum()
        own = {"critic_loss": (loss.detach(), count), "values": (masked_sum(values.detach(), mask), count)}
        return StepOutput(loss, aux_loss, {**own, **metrics})

    def export(self, *, path: str) -> None:
        """Write the critic as a Hugging Face folder; all ranks call it."""
        export_model(self.engine, self.strategy, path, self.tokenizer)


class ReferenceWorker(Worker):
    """The model that the policy should stay close to."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy):
        super().__init__(config, strategy)
        actor = load_actor(config, strategy, train=False)
        self.model = strategy.prepare_eval(actor, offload=config.reward.ref_reward_offload)

    def log_probs(self, batches: list[SequenceBatch]) -> list[Tensor]:
        """Return the log-probs ``(B, T)`` of the actions at the rollout temperature."""
        temperature = scoring_temperature(self.config)
        return self._forward(
            batches,
            lambda batch: (
                self.model(
                    batch.sequences, batch.attention_mask, temperature=temperature, where=batch.action_mask
                ).log_probs
            ),
        )


class RewardWorker(Worker):
    """A reward model: one score a sequence."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy, *, path: str):
        super().__init__(config, strategy)
        self.model = load_reward_model(config, strategy, path, self.tokenizer)

    def score(self, batches: list[SequenceBatch]) -> list[Tensor]:
        """Return the scores ``(B,)``. An answer that was cut off is read with an end-of-sequence token appended."""
        return self._forward(batches, self._score)

    def _score(self, batch: SequenceBatch) -> Tensor:
        sequences, attention_mask = close_with_eos(batch.sequences, batch.attention_mask, self.tokenizer.eos_token_id)
        return self.model(sequences, attention_mask, read="last")
