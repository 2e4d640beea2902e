"""From rollouts to experiences: the driver's side. It holds token ids and scalars; tensors go between the workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import NumericError
from openrlhf.ops.kl import AdaptiveKLController, FixedKLController
from openrlhf.rollout.reward_result import RewardResult, RewardSource
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams, SequenceBatch
from openrlhf.strategy.comm import Comm, SoloComm
from openrlhf.trainer.ppo.assembly import add_statistics, explained_variance, shape_scores, whitening
from openrlhf.trainer.ppo.checks import check_rollout, name_prompts
from openrlhf.trainer.ppo.groups import WorkerGroup, deal
from openrlhf.trainer.ppo.process import ProcessRewardWorker, Steps, sums_of
from openrlhf.trainer.ppo.shards import joined, rows_joined, rows_split_like, shard, split_like
from openrlhf.trainer.ppo.together import score_together
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker


@dataclass(frozen=True)
class Roles:
    """The groups of workers of a run; a role that the run does not need is None.

    ``shared``: the policy and the critic live on the same devices, so they learn one after the other. ``comm``: the
    processes that run the loop, each with all samples: the driver alone on Ray, every rank under a launcher.
    ``watched`` looks after workers and engines elsewhere while this process runs code that does not wait for them.
    """

    policy: WorkerGroup
    critic: WorkerGroup | None = None
    reference: WorkerGroup | None = None
    rewards: Sequence[WorkerGroup] = ()
    process: WorkerGroup | None = None
    shared: bool = False
    comm: Comm = SoloComm()
    watched: Callable[[], AbstractContextManager] = nullcontext

    @property
    def groups(self) -> list[WorkerGroup]:
        """All groups that there are, the policy's first."""
        named = (self.policy, self.critic, self.reference, *self.rewards, self.process)
        return [group for group in named if group is not None]

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
        kl_coef: weight of the divergence in the loss of the policy; 0 where it is part of the rewards.
        rollouts: what they were made of.
        scores: one a rollout, as the reward sources gave it.
        true_scores: one a rollout of ``--eval_reward_func``, which nothing learns from; None without it.
        metrics: means to log.
    """

    shards: list[Any]
    whiten: tuple[float, float] | None
    kl: float
    kl_coef: float
    rollouts: list[Rollout]
    scores: list[float]
    true_scores: list[float] | None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rated:
    """Rollouts with what the reward sources gave.

    Attributes:
        rollouts: the samples of one prompt next to each other.
        scores: ``(N,)`` the sum of all sources, rewards of steps included.
        extra: further numbers of a reward function by name, one a rollout.
        steps: what a process reward model gives to the steps of each rollout; None without one.
    """

    rollouts: list[Rollout]
    scores: Tensor
    extra: dict[str, list[float]] = field(default_factory=dict)
    steps: Steps | None = None

    @property
    def of_steps(self) -> Tensor:
        """``(N,)`` what of the scores the steps were given."""
        return torch.zeros_like(self.scores) if self.steps is None else sums_of(self.steps).to(self.scores)

    @property
    def judged(self) -> list[float]:
        """What a filter goes by: the ``scores`` that a function gives beside its rewards, else the rewards."""
        return self.extra.get("scores") or self.scores.tolist()

    def select(self, rows: Sequence[int]) -> Rated:
        """Return the given rows."""
        extra = {name: [values[row] for row in rows] for name, values in self.extra.items()}
        steps = None if self.steps is None else [self.steps[row] for row in rows]
        return Rated([self.rollouts[row] for row in rows], self.scores[list(rows)], extra, steps)

    @classmethod
    def join(cls, parts: Sequence[Rated]) -> Rated:
        """Return the rows of all parts; of the further numbers those that all have."""
        names = [name for name in parts[0].extra if all(name in part.extra for part in parts)]
        extra = {name: [value for part in parts for value in part.extra[name]] for name in names}
        steps = None if parts[0].steps is None else [row for part in parts for row in part.steps]
        rollouts, scores = [r for part in parts for r in part.rollouts], torch.cat([part.scores for part in parts])
        return cls(rollouts, scores, extra, steps)


def build_kl_controller(config: PPOConfig) -> FixedKLController | AdaptiveKLController:
    """Return the controller of the KL coefficient that the flags ask for."""
    algorithm = config.algorithm
    if algorithm.kl_target is None:
        return FixedKLController(algorithm.init_kl_coef)
    return AdaptiveKLController(algorithm.init_kl_coef, algorithm.kl_target, algorithm.kl_horizon)


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
        reward_function: python files and servers; their rewards are added to those of the reward models.
        true_score: of ``--eval_reward_func``; for the log only.
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        tokenizer: Any,
        reward_function: RewardSource | None = None,
        true_score: RewardSource | None = None,
    ):
        self.config = config
        self.roles = roles
        self.tokenizer = tokenizer
        self.reward_function = reward_function
        self.true_score = true_score
        self.kl_controller = build_kl_controller(config)
        self._baseline = config.algorithm.estimator.load_baseline()

    def make(
        self, rollouts: list[Rollout], greedy: list[Rollout] | None = None, rated: Rated | None = None
    ) -> Experiences:
        """Return the experiences of ``rollouts``, samples of one prompt next to each other.

        Args:
            rollouts: the samples.
            greedy: one greedy answer to each prompt, for an estimator that needs them.
            rated: what :meth:`rate` said of the samples, if they were rated already.

        Raises:
            InfraError: the engine and the policy disagree about the log-probs of the samples.
            NumericError: a reward, a log-prob, a KL or an advantage is not finite.
            DataError: no answer has a token to learn from.
        """
        roles, parts = self.roles, self.roles.shards
        shards = self._shard(rollouts)
        log_probs = roles.policy.map(PolicyWorker.log_probs, shards)
        reference = self._ask_reference(shards) if self.config.algorithm.needs_reference else log_probs
        values = roles.critic.map(CriticWorker.values, shards) if roles.critic else [None] * parts
        rated = rated or self._rate(rollouts, shards)
        true, scores = self._ask(self.true_score, rollouts), rated.scores
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
            true_scores=true.rewards if true else None,
        )
        of_scores = self._of_scores(rated, clipped, shaped, statistics)
        return replace(made, metrics=_of_functions(rated, true) | self._metrics(made, statistics) | of_scores)

    def score(self, rollouts: list[Rollout]) -> tuple[Rated, list[float] | None]:
        """Return the rewards of ``rollouts``, and their scores by ``--eval_reward_func`` where there is one."""
        rated = self.rate(rollouts)
        true = self._ask(self.true_score, rollouts)
        return rated, true.rewards if true else None

    def rate(self, rollouts: list[Rollout]) -> Rated:
        """Return what the reward sources say of ``rollouts``."""
        return self._rate(rollouts, self._shard(rollouts))

    def _shard(self, rollouts: list[Rollout]) -> list[SequenceBatch]:
        by_tokens = self.config.batch.use_dynamic_batch
        return shard(rollouts, self.roles.shards, self.tokenizer.pad_token_id, by_tokens)

    def _rate(self, rollouts: list[Rollout], shards: list[SequenceBatch]) -> Rated:
        models, process = self._ask_models(shards), self.roles.process
        judged = process.map(ProcessRewardWorker.score, shards) if process else []
        function = self._ask(self.reward_function, rollouts)
        steps = rows_joined(shards, process.get(judged)) if process else None
        scores = self._add_up(rollouts, shards, models, function, steps)
        return Rated(rollouts, scores, function.extra if function else {}, steps)

    def _ask_reference(self, shards: list[SequenceBatch]) -> list[Any]:
        """Return futures of the log-probs of the reference: a model of its own, or the policy without its adapter."""
        if self.roles.reference:
            return self.roles.reference.map(ReferenceWorker.log_probs, shards)
        return self.roles.policy.map(PolicyWorker.reference_log_probs, shards)

    def _ask_models(self, shards: list[SequenceBatch]) -> list[tuple[WorkerGroup, list[Any]]]:
        """Set every reward model to work at once and return its futures."""
        return [(group, group.map(RewardWorker.score, shards)) for group in self.roles.rewards]

    def _ask(self, function: RewardSource | None, rollouts: list[Rollout]) -> RewardResult | None:
        """Return what python files and servers say, or None when there are none."""
        if function is None:
            return None
        return score_together(self.roles.comm, rollouts, partial(self._ask_alone, function))

    def _ask_alone(self, function: RewardSource, rollouts: list[Rollout]) -> RewardResult:
        """Return what python files and servers say of some of the rollouts."""
        prompts = [rollout.prompt for rollout in rollouts]
        queries = self.tokenizer.batch_decode([list(rollout.token_ids) for rollout in rollouts])
        heads = self.tokenizer.batch_decode([list(prompt.token_ids) for prompt in prompts])
        # A prompt that was cut, or that decodes to another text, would not be the beginning of its query.
        texts = [
            prompt.text if query.startswith(prompt.text) else head
            for query, prompt, head in zip(queries, prompts, heads, strict=True)
        ]
        with self.roles.watched():
            return function.score(queries, texts, [p.label for p in prompts], [p.uid for p in prompts])

    def _add_up(
        self,
        rollouts: list[Rollout],
        shards: list[SequenceBatch],
        models: list[tuple[WorkerGroup, list[Any]]],
        function: RewardResult | None,
        steps: Steps | None,
    ) -> Tensor:
        """Return the weighted sum of all reward sources ``(N,)``.

        Raises:
            NumericError: names the prompts without a number.
        """
        weights, _ = self.config.reward_weights
        columns = [
            weight * joined(shards, group.get(futures)).double()
            for weight, (group, futures) in zip(weights, models, strict=True)
        ]
        if function is not None:
            columns.append(torch.tensor(function.rewards, dtype=torch.float64))
        if steps is not None:
            columns.append(sums_of(steps))
        scores = torch.stack(columns).sum(dim=0)
        scores = scores.float()
        wrong = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        if wrong:
            who = name_prompts(rollouts, wrong)
            raise NumericError(f"the rewards of {len(wrong)} answers are not finite; they answer {who}", wrong)
        return scores

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
        return self._baseline(clipped, samples, self._shape(self.rate(greedy)))

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


def _of_functions(rated: Rated, true: RewardResult | None) -> dict[str, float]:
    """Return the means of what a reward function gives beside its rewards, and of the true score."""
    true_score = {"true_score": true.rewards} if true else {}
    return {name: sum(values) / len(values) for name, values in {**rated.extra, **true_score}.items()}
