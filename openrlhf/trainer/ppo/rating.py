"""What answers are worth: what reward models, functions, servers and process rewards say of them, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import NumericError
from openrlhf.rollout.reward_result import RewardResult, RewardSource, join_extra
from openrlhf.rollout.types import Rollout, SequenceBatch
from openrlhf.trainer.ppo.checks import name_prompts
from openrlhf.trainer.ppo.groups import WorkerGroup
from openrlhf.trainer.ppo.process import ProcessRewardWorker, Steps, sums_of
from openrlhf.trainer.ppo.roles import Roles
from openrlhf.trainer.ppo.shards import joined, rows_joined, shard
from openrlhf.trainer.ppo.together import score_together
from openrlhf.trainer.ppo.workers import RewardWorker


@dataclass(frozen=True)
class Rated:
    """Rollouts with what the reward sources gave.

    Attributes:
        rollouts: the samples of one prompt next to each other.
        scores: ``(N,)`` the sum of all sources, rewards of steps included.
        extra: further numbers of a reward function by name, one a rollout.
        steps: what a process reward model gives to the steps of each rollout; None without one.
        parts: what the scores are the sum of, by the kind of source, one a rollout.
    """

    rollouts: list[Rollout]
    scores: Tensor
    extra: dict[str, list[float]] = field(default_factory=dict)
    steps: Steps | None = None
    parts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def all_parts(self) -> dict[str, list[float]]:
        """The parts of the scores where there are several, and the further numbers of a reward function."""
        return {**(self.parts if len(self.parts) > 1 else {}), **self.extra}

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
        extra, parts = (
            {name: [values[row] for row in rows] for name, values in columns.items()}
            for columns in (self.extra, self.parts)
        )
        steps = None if self.steps is None else [self.steps[row] for row in rows]
        return Rated([self.rollouts[row] for row in rows], self.scores[list(rows)], extra, steps, parts)

    @classmethod
    def join(cls, parts: Sequence[Rated]) -> Rated:
        """Return the rows of all parts. Raises DataError when a further number is in some of them only."""
        steps = None if parts[0].steps is None else [row for part in parts for row in part.steps]
        rollouts, scores = [r for part in parts for r in part.rollouts], torch.cat([part.scores for part in parts])
        extra = join_extra([part.extra for part in parts], "the reward sources")
        summands = join_extra([part.parts for part in parts], "the reward sources")
        return cls(rollouts, scores, extra, steps, summands)


class Rater:
    """Asks every reward source about rollouts.

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
        self.config, self.roles, self.tokenizer = config, roles, tokenizer
        self.reward_function, self.true_score = reward_function, true_score

    def score(self, rollouts: list[Rollout]) -> tuple[Rated, list[float] | None]:
        """Return the rewards of ``rollouts``, and their scores by ``--eval_reward_func`` where there is one."""
        return self.rate(rollouts), self.true_scores(rollouts)

    def rate(self, rollouts: list[Rollout], shards: list[SequenceBatch] | None = None) -> Rated:
        """Return what the reward sources say of ``rollouts``; ``shards`` as of :meth:`shard`."""
        shards = self.shard(rollouts) if shards is None else shards
        models, process = self._ask_models(shards), self.roles.process
        judged = process.map(ProcessRewardWorker.score, shards) if process else []
        function = self._ask(self.reward_function, rollouts)
        steps = rows_joined(shards, process.get(judged)) if process else None
        columns = self._columns(shards, models, function, steps)
        scores = _add_up(rollouts, columns)
        parts = {name: values.tolist() for name, values in columns.items()}
        return Rated(rollouts, scores, function.extra if function else {}, steps, parts)

    def true_scores(self, rollouts: list[Rollout]) -> list[float] | None:
        """Return what ``--eval_reward_func`` says of ``rollouts``, or None without it."""
        found = self._ask(self.true_score, rollouts)
        return found.rewards if found else None

    def shard(self, rollouts: list[Rollout]) -> list[SequenceBatch]:
        """Return ``rollouts`` dealt to the workers."""
        by_tokens = self.config.batch.use_dynamic_batch
        return shard(rollouts, self.roles.shards, self.tokenizer.pad_token_id, by_tokens)

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

    def _columns(
        self,
        shards: list[SequenceBatch],
        models: list[tuple[WorkerGroup, list[Any]]],
        function: RewardResult | None,
        steps: Steps | None,
    ) -> dict[str, Tensor]:
        """Return what each kind of source gives ``(N,)``, times its weight, by a name."""
        weights, _ = self.config.reward_weights
        columns = {
            name.replace("reward", "reward_model"): weight * joined(shards, group.get(futures)).double()
            for name, weight, (group, futures) in zip(self.config.model.reward_names, weights, models, strict=True)
        }
        if function is not None:
            columns["function"] = torch.tensor(function.rewards, dtype=torch.float64)
        if steps is not None:
            columns["steps"] = sums_of(steps)
        return columns


def _add_up(rollouts: list[Rollout], columns: dict[str, Tensor]) -> Tensor:
    """Return the sum of all sources ``(N,)``.

    Raises:
        NumericError: names the prompts without a number.
    """
    scores = torch.stack([*columns.values()]).sum(dim=0).float()
    wrong = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if wrong:
        who = name_prompts(rollouts, wrong)
        raise NumericError(f"the rewards of {len(wrong)} answers are not finite; they answer {who}", wrong)
    return scores
