"""From rollouts to experiences: the driver's side. It holds token ids and scalars; tensors go between the workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import NumericError
from openrlhf.ops.kl import AdaptiveKLController, FixedKLController
from openrlhf.rollout.reward_source import RewardFunction, RewardResult
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams, SequenceBatch
from openrlhf.strategy import signals
from openrlhf.trainer.ppo.assembly import add_statistics, explained_variance, whitening
from openrlhf.trainer.ppo.buffer import blank_sequences
from openrlhf.trainer.ppo.checks import check_rollout, name_prompts
from openrlhf.trainer.ppo.groups import WorkerGroup, deal
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker


@dataclass(frozen=True)
class Roles:
    """The groups of workers of a run; a role that the run does not need is None.

    ``shared``: the policy and the critic live on the same devices, so they learn one after the other.
    """

    policy: WorkerGroup
    critic: WorkerGroup | None = None
    reference: WorkerGroup | None = None
    rewards: Sequence[WorkerGroup] = ()
    shared: bool = False

    @property
    def groups(self) -> list[WorkerGroup]:
        """All groups that there are, the policy's first."""
        return [group for group in (self.policy, self.critic, self.reference, *self.rewards) if group is not None]

    @property
    def shards(self) -> int:
        """Into how many shards a rollout is cut, so that every group gets equally many: the least common multiple."""
        return math.lcm(*(group.size for group in self.groups))


@dataclass(frozen=True)
class Experiences:
    """The experiences of a rollout step.

    Attributes:
        shards: futures of :class:`~openrlhf.rollout.types.Experience`, one a shard.
        whiten: mean and 1 / standard deviation of the advantages over all actions, or None to leave them.
        kl: mean divergence from the reference over all actions.
        rollouts: what they were made of.
        scores: one a rollout, as the reward sources gave it.
        true_scores: one a rollout of ``--eval_reward_func``, which nothing learns from; None without it.
        metrics: means to log.
    """

    shards: list[Any]
    whiten: tuple[float, float] | None
    kl: float
    rollouts: list[Rollout]
    scores: list[float]
    true_scores: list[float] | None
    metrics: dict[str, float] = field(default_factory=dict)


def build_kl_controller(config: PPOConfig) -> FixedKLController | AdaptiveKLController:
    """Return the controller of the KL coefficient that the flags ask for."""
    algorithm = config.algorithm
    if algorithm.kl_target is None:
        return FixedKLController(algorithm.init_kl_coef)
    return AdaptiveKLController(algorithm.init_kl_coef, algorithm.kl_target)


def shard(rollouts: Sequence[Rollout], parts: int, pad_id: int) -> list[SequenceBatch]:
    """Return the rollouts as ``parts`` batches, each padded to its own longest; some may have no rows."""
    batches, first = [], 0
    for part in deal(rollouts, parts):
        batches.append(SequenceBatch.from_rollouts(part, pad_id, first) if part else blank_sequences().select([]))
        first += len(part)
    return batches


class PolicyEngine:
    """A :class:`~openrlhf.rollout.engine.RolloutEngine` and weight sync in one: the policy group samples by itself."""

    def __init__(self, policy: WorkerGroup):
        self._policy = policy
        self._version = 0

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return ``sampling.n`` rollouts a prompt, in the order of ``prompts``."""
        parts = self._policy.map(
            PolicyWorker.generate, deal(prompts, self._policy.size), sampling=sampling, version=self._version
        )
        return [rollout for part in self._policy.get(parts) for rollout in part]

    def push(self, version: int) -> None:
        """Remember the version; the weights are there already."""
        self._version = version

    def sleep(self) -> None:
        """Do nothing: the engine owns no memory of its own."""

    def wake_up(self, part: str) -> None:
        """Do nothing, as :meth:`sleep`."""


class ExperienceMaker:
    """Scores rollouts with every role and assembles what the policy and the critic learn from.

    Args:
        config: the run.
        roles: groups of workers.
        tokenizer: the policy's.
        reward_function: of ``--remote_rm_url FILE.py``; its rewards are added to those of the reward models.
        true_score: of ``--eval_reward_func``; for the log only.
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        tokenizer: Any,
        reward_function: RewardFunction | None = None,
        true_score: RewardFunction | None = None,
    ):
        self.config = config
        self.roles = roles
        self.tokenizer = tokenizer
        self.reward_function = reward_function
        self.true_score = true_score
        self.kl_controller = build_kl_controller(config)
        self._baseline = config.algorithm.estimator.load_baseline()

    def make(self, rollouts: list[Rollout]) -> Experiences:
        """Return the experiences of ``rollouts``, samples of one prompt next to each other.

        Raises:
            InfraError: the engine and the policy disagree about the log-probs of the samples.
            NumericError: a reward, a log-prob, a KL or an advantage is not finite.
            DataError: no answer has a token to learn from.
        """
        roles, parts = self.roles, self.roles.shards
        shards = shard(rollouts, parts, self.tokenizer.pad_token_id)
        log_probs = roles.policy.map(PolicyWorker.log_probs, shards)
        reference = self._ask_reference(shards) if self.config.algorithm.needs_reference else log_probs
        values = roles.critic.map(CriticWorker.values, shards) if roles.critic else [None] * parts
        from_models = self._ask_models(shards)
        from_function = self._ask(self.reward_function, rollouts)
        true = self._ask(self.true_score, rollouts)
        scores = self._add_up(rollouts, from_models, from_function)
        shaped = self._shape(scores)
        experiences = roles.policy.map(
            PolicyWorker.assemble,
            shards, log_probs, reference, values, _split_like(shards, scores), _split_like(shards, shaped),
            kl_coef=self.kl_controller.value,
        )  # fmt: skip
        statistics = add_statistics(roles.policy.get(roles.policy.run(PolicyWorker.statistics, experiences)))
        check_rollout(self.config, statistics, rollouts, lambda: roles.policy.get(experiences))
        return self._finish(rollouts, experiences, statistics, scores, shaped, from_function, true)

    def score(self, rollouts: list[Rollout]) -> tuple[list[float], list[float] | None]:
        """Return the reward of every rollout, and its score by ``--eval_reward_func`` where there is one."""
        shards = shard(rollouts, self.roles.shards, self.tokenizer.pad_token_id)
        models = self._ask_models(shards)
        scores = self._add_up(rollouts, models, self._ask(self.reward_function, rollouts))
        true = self._ask(self.true_score, rollouts)
        return scores.tolist(), true.rewards if true else None

    def _ask_reference(self, shards: list[SequenceBatch]) -> list[Any]:
        """Return futures of the log-probs of the reference: a model of its own, or the policy without its adapter."""
        if self.roles.reference:
            return self.roles.reference.map(ReferenceWorker.log_probs, shards)
        return self.roles.policy.map(PolicyWorker.reference_log_probs, shards)

    def _ask_models(self, shards: list[SequenceBatch]) -> list[tuple[WorkerGroup, list[Any]]]:
        """Set every reward model to work at once and return its futures."""
        return [(group, group.map(RewardWorker.score, shards)) for group in self.roles.rewards]

    def _ask(self, function: RewardFunction | None, rollouts: list[Rollout]) -> RewardResult | None:
        """Return what a reward function of python says, or None when there is none."""
        if function is None:
            return None
        prompts = [rollout.prompt for rollout in rollouts]
        queries = self.tokenizer.batch_decode([list(rollout.token_ids) for rollout in rollouts])
        heads = self.tokenizer.batch_decode([list(prompt.token_ids) for prompt in prompts])
        # A prompt that was cut, or that decodes to another text, would not be the beginning of its query.
        texts = [
            prompt.text if query.startswith(prompt.text) else head
            for query, prompt, head in zip(queries, prompts, heads, strict=True)
        ]
        with signals.interruptible():
            return function.score(queries, texts, [p.label for p in prompts], [p.uid for p in prompts])

    def _add_up(
        self, rollouts: list[Rollout], models: list[tuple[WorkerGroup, list[Any]]], function: RewardResult | None
    ) -> Tensor:
        """Return the sum of all reward sources ``(N,)``. Raises NumericError that names prompts without a number."""
        columns = [torch.cat(group.get(futures)).double() for group, futures in models]
        if function is not None:
            columns.append(torch.tensor(function.rewards, dtype=torch.float64))
        scores = torch.stack(columns).sum(dim=0)
        scores = scores.float()
        wrong = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        if wrong:
            who = name_prompts(rollouts, wrong)
            raise NumericError(f"the rewards of {len(wrong)} answers are not finite; they answer {who}", wrong)
        return scores

    def _shape(self, scores: Tensor) -> Tensor:
        """Return the scores ``(N,)`` after the clip and the group baseline, in that order.

        Clipping afterwards would limit how much better than its group an answer is, not the reward itself.
        """
        clipped = scores.clamp(*self.config.reward.reward_clip_range)
        return self._baseline(clipped, self.config.rollout.n_samples_per_prompt)

    def _finish(
        self,
        rollouts: list[Rollout],
        experiences: list[Any],
        statistics: dict[str, float],
        scores: Tensor,
        shaped: Tensor,
        function: RewardResult | None,
        true: RewardResult | None,
    ) -> Experiences:
        """Return the experiences with their metrics."""
        count, rows = max(1.0, statistics["actions"]), len(rollouts)
        whiten = whitening(statistics)
        metrics = {
            "reward": float(scores.double().mean()),
            "return": (float(shaped.double().sum()) - self.kl_controller.value * statistics["kl"]) / rows,
            "response_length": count / rows,
            "total_length": sum(len(rollout.token_ids) for rollout in rollouts) / rows,
            "truncated_rate": sum(rollout.finish_reason == "length" for rollout in rollouts) / rows,
            "kl": statistics["kl"] / count,
            "kl_coef": self.kl_controller.value,
            "entropy": -statistics["log_probs"] / count,
            "advantage_mean": whiten[0],
            "advantage_std": 1.0 / whiten[1],
            "sync_gap": statistics["sync_gap"] / count,
            "sync_gap_max": statistics["sync_gap_max"],
        }
        extra = {name: sum(values) / rows for name, values in (function.extra if function else {}).items()}
        true_score = {"true_score": sum(true.rewards) / rows} if true else {}
        return Experiences(
            shards=experiences,
            whiten=whiten if self.config.algorithm.estimator.whiten else None,
            kl=statistics["kl"] / count,
            rollouts=rollouts,
            scores=scores.tolist(),
            true_scores=true.rewards if true else None,
            metrics={**extra, **metrics, **self._of_estimator(statistics, scores), **true_score},
        )

    def _of_estimator(self, statistics: dict[str, float], scores: Tensor) -> dict[str, float]:
        """Return how much the estimator has to work with: groups without a difference, the critic's accuracy."""
        estimator, found = self.config.algorithm.estimator, {}
        if estimator.needs_group:
            groups = scores.clamp(*self.config.reward.reward_clip_range)
            groups = groups.view(-1, self.config.rollout.n_samples_per_prompt)
            found["zero_variance_groups"] = float((groups.amax(dim=1) == groups.amin(dim=1)).double().mean())
        if estimator.needs_critic:
            found["explained_variance"] = explained_variance(statistics)
        return found


def _split_like(shards: list[SequenceBatch], column: Tensor) -> list[Tensor]:
    """Return ``column`` ``(N,)`` cut at the borders of ``shards``."""
    return list(column.split([len(part) for part in shards]))
