"""The models of PPO, one class a role: policy, reference, critic, reward. They know a strategy, not Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import NumericError
from openrlhf.models.actor import ActorOutput
from openrlhf.models.adapters import parameter_counts, trained_names
from openrlhf.ops.masking import masked_sum
from openrlhf.ops.policy_loss import value_loss, weight
from openrlhf.rollout.hf_engine import HFEngine
from openrlhf.rollout.types import Experience, Prompt, Rollout, SamplingParams, SequenceBatch
from openrlhf.rollout.weights import Weights, in_buckets
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import merged_weights, named_weights
from openrlhf.strategy.export import export_model
from openrlhf.trainer.loop import StepOutput
from openrlhf.trainer.metrics import MetricSums
from openrlhf.trainer.ppo.assembly import (
    add_statistics,
    close_with_eos,
    experience_statistics,
    make_experience,
    scoring_temperature,
    token_columns,
)
from openrlhf.trainer.ppo.average import WeightAverage
from openrlhf.trainer.ppo.models import load_actor, load_critic, load_reward_model
from openrlhf.trainer.ppo.objective import PolicyObjective
from openrlhf.trainer.ppo.process import Steps, laid_out, step_tokens
from openrlhf.trainer.ppo.texts import check_texts, load_pretrain_texts
from openrlhf.trainer.ppo.worker_base import Means, TrainedWorker, Worker


class PolicyWorker(TrainedWorker):
    """The policy: generates when there is no other engine, scores, assembles experiences, learns."""

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy, *, max_steps: int):
        super().__init__(config, strategy)
        self.actor = load_actor(config, strategy)
        self.engine = strategy.prepare_train(self.actor, config.optim.actor, max_steps)
        if strategy.ring.size > 1:
            self.actor.verify()  # together: later a rank alone may be the first to generate
        self.rest()
        self.objective = PolicyObjective(config)
        self._kl_coef = 0.0
        self.texts = load_pretrain_texts(config, strategy, self.tokenizer)
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
        steps: list[Steps] | None = None,
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
            steps: rewards of the steps of every answer, in ``scores`` and ``shaped`` already; None without any.
            kl_coef: weight of the KL in the token rewards.
        """
        columns = zip(batches, log_probs, ref_log_probs, values, scores, shaped, strict=True)
        placed = [None] * len(batches) if steps is None else self._laid_out(batches, steps)
        return [
            make_experience(self.config.algorithm, *column, kl_coef=kl_coef, steps=found)
            for column, found in zip(columns, placed, strict=True)
        ]

    def _laid_out(self, batches: list[SequenceBatch], steps: list[Steps]) -> list[Tensor]:
        placeholder = step_tokens(self.config, self.tokenizer).placeholder
        return [laid_out(batch, rows, placeholder) for batch, rows in zip(batches, steps, strict=True)]

    def statistics(self, experiences: list[Experience]) -> dict[str, float]:
        """Return sums over the actions of this rank, for the driver to add up."""
        return add_statistics([experience_statistics(experience) for experience in experiences if len(experience)])

    def token_columns(
        self,
        experiences: list[Experience],
        *,
        starts: dict[int, int],
        most: int,
        whiten: tuple[float, float] | None,
    ) -> dict[int, dict[str, list[float]]]:
        """Return figures of the tokens of those samples that this rank has, for people to read."""
        found: dict[int, dict[str, list[float]]] = {}
        for experience in experiences:
            needs = self.config.algorithm.needs_reference
            found |= token_columns(experience, starts, most, whiten=whiten, reference=needs)
        return found

    @property
    def reduction(self) -> str:
        """What the loss is a mean of: ``"token"`` or ``"sequence"``."""
        return self.objective.reduction

    def update(
        self,
        experiences: list[Experience],
        *,
        rollout: int,
        whiten: tuple[float, float] | None = None,
        kl_coef: float = 0.0,
    ) -> Means:
        """Learn as every role does; ``kl_coef`` is the weight of the divergence from the reference in the loss."""
        self._kl_coef = kl_coef
        return super().update(experiences, rollout=rollout, whiten=whiten)

    def loss(self, batch: Experience, whiten: tuple[float, float] | None) -> StepOutput:
        """Return the loss of the policy summed over the actions, or sequences."""
        output = self._read(batch, with_entropy=self.objective.reads_entropy)
        loss, metrics = self.objective.loss(batch, output, whiten, self._kl_coef)
        return StepOutput(loss, output.aux_loss, metrics)

    def _action_log_probs(self, batch: SequenceBatch) -> Tensor:
        return self._read(batch).log_probs

    def _read(self, batch: SequenceBatch, with_entropy: bool = False) -> ActorOutput:
        return self.engine(
            batch.sequences,
            batch.attention_mask,
            temperature=scoring_temperature(self.config),
            where=batch.action_mask,
            with_entropy=with_entropy,
        )

    def learn_beside(self) -> MetricSums:
        """Learn the next texts of ``--pretrain_data``."""
        return self.texts.learn(self.engine) if self.texts else super().learn_beside()

    def look_beside(self, error: NumericError) -> None:
        """Say when it was a text that spoilt a step."""
        if self.texts:
            self.texts.look(error)

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
            self.actor,
            self.tokenizer,
            rollout.micro_rollout_batch_size,
            version,
            max_len=rollout.max_model_len,
            comm=self.comm,
        )
        with self.comm.waiting("generation"):
            return [engine.generate(part, sampling) for part in prompts]

    def weight_buckets(self, bucket_bytes: int) -> Iterator[Weights]:
        """Yield the weights as ``(Hugging Face name, whole CPU tensor)`` in lists of about ``bucket_bytes``.

        Adapters are merged into the weights that they belong to. All ranks must exhaust it; only rank 0 gets any.
        """
        yield from in_buckets(
            merged_weights(self.actor.model, self.strategy, wanted=self.comm.rank == 0), bucket_bytes
        )

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that learn, whole, on rank 0: all of them, or the adapter's."""
        names = trained_names(self.actor.model) if self.actor.has_adapter else None
        return named_weights(self.actor.model, self.strategy, wanted=self.comm.rank == 0, only=names)

    def save(self, *, path: str) -> None:
        """Write the training state, the place in the texts and the moving average; all ranks call it."""
        super().save(path=path)
        if self.texts and self.comm.rank == 0:
            self.texts.save(Path(path))
        if self.average and self.comm.rank == 0:
            self.average.save(Path(path) / "ema.pt")

    def load(self, *, path: str) -> None:
        """Continue from what :meth:`save` wrote."""
        check_texts(self.config, Path(path))
        super().load(path=path)
        if self.texts:
            self.texts.load(Path(path))
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
        """Return the clipped squared error summed over the actions, or sequences."""
        mask, clip = batch.action_mask, self.config.algorithm.value_clip
        found, aux_loss = self.engine(batch.sequences, batch.attention_mask, read="each", with_aux_loss=True)
        values = found[:, :-1]
        loss, metrics = value_loss(values, batch.values, batch.returns, mask, clip=clip, reduction=self.reduction)
        own = {
            "critic_loss": (loss.detach(), weight(mask, self.reduction)),
            "values": (masked_sum(values.detach(), mask), mask.sum()),
        }
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
        return [scores.flatten() for scores in self._forward(batches, self._score)]

    def _score(self, batch: SequenceBatch) -> Tensor:
        sequences, attention_mask = close_with_eos(batch.sequences, batch.attention_mask, self.tokenizer.eos_token_id)
        return self.model(sequences, attention_mask, read="last")
