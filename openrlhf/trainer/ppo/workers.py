"""The models of PPO, one class a role: policy, reference, critic, reward. They know a strategy, not Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.models.actor import ActorOutput
from openrlhf.models.adapters import parameter_counts, trained_names
from openrlhf.ops.masking import masked_sum, masked_whiten
from openrlhf.ops.policy_loss import ppo_policy_loss, value_loss
from openrlhf.rollout.hf_engine import HFEngine
from openrlhf.rollout.types import Experience, Prompt, Rollout, SamplingParams, SequenceBatch
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import merged_weights, named_weights
from openrlhf.strategy.export import export_model
from openrlhf.trainer.loop import StepOutput
from openrlhf.trainer.ppo.assembly import (
    add_statistics,
    close_with_eos,
    experience_statistics,
    make_experience,
    scoring_temperature,
)
from openrlhf.trainer.ppo.average import WeightAverage
from openrlhf.trainer.ppo.models import load_actor, load_critic, load_reward_model
from openrlhf.trainer.ppo.worker_base import TrainedWorker, Worker


class PolicyWorker(TrainedWorker):
    """The policy: generates when there is no other engine, scores, assembles experiences, learns."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy, *, max_steps: int):
        super().__init__(config, strategy)
        self.actor = load_actor(config, strategy)
        self.engine = strategy.prepare_train(self.actor, config.optim.actor, max_steps)
        self.rest()
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
        self.rest()

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
