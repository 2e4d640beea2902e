"""From rollouts to experiences: the driver's side. It holds token ids and scalars; tensors go between the workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.ops.kl import AdaptiveKLController, FixedKLController
from openrlhf.rollout.types import Rollout, SequenceBatch
from openrlhf.trainer.ppo.assembly import add_statistics, explained_variance, shape_scores, whitening
from openrlhf.trainer.ppo.checks import check_rollout
from openrlhf.trainer.ppo.rating import Rated, Rater
from openrlhf.trainer.ppo.roles import Roles
from openrlhf.trainer.ppo.shards import rows_split_like, split_like
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker


@dataclass(frozen=True)
class Experiences:
    """The experiences of a rollout step.

    Attributes:
        shards: futures of :class:`~openrlhf.rollout.types.Experience`, one a shard.
        whiten: mean and 1 / standard deviation of the advantages over all actions, or None to leave them.
        kl: mean divergence from the reference over all actions.
        kl_coef: weight of the divergence in the loss of the policy; 0 where it is part of the rewards.
        rollouts: what they were made of.
        scores: one a rollout, as the reward sources gave it.
        true_scores: one a rollout of ``--eval_reward_func``, which nothing learns from; None without it.
        parts: what the scores were added up from, and what reward functions gave beside; by name, one a rollout.
        metrics: means to log.
    """

    shards: list[Any]
    whiten: tuple[float, float] | None
    kl: float
    kl_coef: float
    rollouts: list[Rollout]
    scores: list[float]
    true_scores: list[float] | None
    parts: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def build_kl_controller(config: PPOConfig) -> FixedKLController | AdaptiveKLController:
    """Return the controller of the KL coefficient that the flags ask for."""
    algorithm = config.algorithm
    if algorithm.kl_target is None:
        return FixedKLController(algorithm.init_kl_coef)
    return AdaptiveKLController(algorithm.init_kl_coef, algorithm.kl_target, algorithm.kl_horizon)


class ExperienceMaker:
    """Scores rollouts with every role and assembles what the policy and the critic learn from.

    Args:
        config: the run.
        roles: groups of workers.
        rater: asks the reward sources.
    """

    def __init__(self, config: PPOConfig, roles: Roles, rater: Rater):
        self.config = config
        self.roles = roles
        self.rater = rater
        self.kl_controller = build_kl_controller(config)
        self._baseline = config.algorithm.estimator.load_baseline()

    def make(
        self, rollouts: list[Rollout], greedy: list[Rollout] | None = None, rated: Rated | None = None
    ) -> Experiences:
        """Return the experiences of ``rollouts``, samples of one prompt next to each other.

        Args:
            rollouts: the samples.
            greedy: one greedy answer to each prompt, for an estimator that needs them.
            rated: what the rater said of the samples, if they were rated already.

        Raises:
            InfraError: the engine and the policy disagree about the log-probs of the samples.
            NumericError: a reward, a log-prob, a KL or an advantage is not finite.
            DataError: no answer has a token to learn from.
        """
        roles, parts = self.roles, self.roles.shards
        shards = self.rater.shard(rollouts)
        log_probs = roles.policy.map(PolicyWorker.log_probs, shards)
        reference = self._ask_reference(shards) if self.config.algorithm.needs_reference else log_probs
        values = roles.critic.map(CriticWorker.values, shards) if roles.critic else [None] * parts
        rated = rated or self.rater.rate(rollouts, shards)
        true_scores, scores = self.rater.true_scores(rollouts), rated.scores
        clipped = self._shape(rated)
        shaped = self._above_baseline(clipped, greedy)
        algorithm, kl_coef = self.config.algorithm, self.kl_controller.value
        experiences = roles.policy.map(
            PolicyWorker.assemble,
            shards, log_probs, reference, values, split_like(shards, scores), split_like(shards, shaped),
            *([] if rated.steps is None else [rows_split_like(shards, rated.steps)]),
            kl_coef=0.0 if algorithm.use_kl_loss else kl_coef,
        )  # fmt: skip
        statistics = add_statistics(roles.policy.get(roles.policy.run(PolicyWorker.statistics, experiences)))
        check_rollout(self.config, statistics, rollouts, lambda: roles.policy.get(experiences))
        made = Experiences(
            shards=experiences,
            whiten=self._whiten(statistics),
            kl=statistics["kl"] / max(1.0, statistics["actions"]),
            kl_coef=kl_coef if algorithm.use_kl_loss else 0.0,
            rollouts=rollouts,
            scores=scores.tolist(),
            true_scores=true_scores,
            parts=rated.all_parts,
        )
        of_scores = self._of_scores(rated, clipped, shaped, statistics)
        return replace(made, metrics=_of_functions(rated, true_scores) | self._metrics(made, statistics) | of_scores)

    def _ask_reference(self, shards: list[SequenceBatch]) -> list[Any]:
        """Return futures of the log-probs of the reference: a model of its own, or the policy without its adapter."""
        if self.roles.reference:
            return self.roles.reference.map(ReferenceWorker.log_probs, shards)
        return self.roles.policy.map(PolicyWorker.reference_log_probs, shards)

    def _shape(self, rated: Rated) -> Tensor:
        """Return the scores ``(N,)`` clipped and with the penalties for length, but for what the steps were given."""
        return shape_scores(self.config, rated.scores - rated.of_steps, rated.rollouts) + rated.of_steps

    def _above_baseline(self, clipped: Tensor, greedy: list[Rollout] | None) -> Tensor:
        """Return the scores ``(N,)`` less the baseline of the estimator.

        The clip comes before: afterwards it would limit how much better than its group an answer is.
        """
        samples = self.config.rollout.n_samples_per_prompt
        if greedy is None:
            return self._baseline(clipped, samples)
        return self._baseline(clipped, samples, self._shape(self.rater.rate(greedy)))

    def _whiten(self, statistics: dict[str, float]) -> tuple[float, float] | None:
        """Return what the advantages are shifted by and multiplied with, or None."""
        algorithm = self.config.algorithm
        if not algorithm.estimator.whiten:
            return None
        mean, scale = whitening(statistics)
        return mean, 1.0 if algorithm.no_advantage_std_norm else scale

    def _metrics(self, made: Experiences, statistics: dict[str, float]) -> dict[str, float]:
        """Return means over the rollouts and over their actions."""
        rollouts, count, rows = made.rollouts, max(1.0, statistics["actions"]), len(made.rollouts)
        mean, scale = whitening(statistics)
        return {
            "response_length": count / rows,
            "total_length": sum(len(rollout.token_ids) for rollout in rollouts) / rows,
            "truncated_rate": sum(rollout.finish_reason == "length" for rollout in rollouts) / rows,
            "kl": made.kl,
            "kl_coef": self.kl_controller.value,
            "entropy": -statistics["log_probs"] / count,
            "advantage_mean": mean,
            "advantage_std": 1.0 / scale,
            "sync_gap": statistics["sync_gap"] / count,
            "sync_gap_max": statistics["sync_gap_max"],
        }

    def _of_scores(
        self, rated: Rated, clipped: Tensor, shaped: Tensor, statistics: dict[str, float]
    ) -> dict[str, float]:
        """Return means of the scores, and how much the estimator has to work with.

        That are groups without a difference, and the accuracy of a critic.
        """
        algorithm, reward, scores = self.config.algorithm, self.config.reward, rated.scores
        rows = len(scores)
        in_reward = 0.0 if algorithm.use_kl_loss else self.kl_controller.value * statistics["kl"]
        found = {
            "reward": float(scores.double().mean()),
            "return": (float(shaped.double().sum()) - in_reward) / rows,
        }
        if reward.has_length_penalty:
            outcome, penalised = scores - rated.of_steps, clipped - rated.of_steps
            found["length_penalty"] = float((outcome.clamp(*reward.reward_clip_range) - penalised).double().mean())
        if rated.steps is not None:
            count = sum(map(len, rated.steps))
            found["steps_per_answer"] = count / rows
            found["step_reward"] = float(rated.of_steps.double().sum()) / max(1, count)
        if algorithm.estimator.needs_group:
            groups = clipped.view(-1, self.config.rollout.n_samples_per_prompt)
            found["zero_variance_groups"] = float((groups.amax(dim=1) == groups.amin(dim=1)).double().mean())
        if algorithm.estimator.needs_critic:
            found["explained_variance"] = explained_variance(statistics)
        return found


def _of_functions(rated: Rated, true_scores: list[float] | None) -> dict[str, float]:
    """Return the means of what a reward function gives beside its rewards, and of the true score."""
    true_score = {"true_score": true_scores} if true_scores else {}
    return {name: sum(values) / len(values) for name, values in {**rated.extra, **true_score}.items()}
