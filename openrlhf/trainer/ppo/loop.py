"""The PPO loop: prompts, rollouts, experiences, update, weight sync. It reads the same wherever the workers live.

The loop holds all prompts and never asks who is rank 0; :class:`~openrlhf.trainer.ppo.roles.Roles` say where the
models are. On Ray one driver runs it; under a launcher every rank does, in step with the others, and the groups deal
the work out. What happens between rollout steps (progress, logs, evaluation, checkpoints) are callbacks, shared with
the supervised loop: ``global_step`` counts rollout steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from openrlhf.config.ppo import PPOConfig
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.errors import DataError, NumericError, Preempted
from openrlhf.rollout.engine import RolloutEngine, WeightSync
from openrlhf.rollout.types import Prompt, Rollout
from openrlhf.strategy import signals
from openrlhf.strategy.rng import rewound_when_stopped
from openrlhf.trainer.callbacks import Callback, Callbacks
from openrlhf.trainer.console import OURS
from openrlhf.trainer.continuity import check_position
from openrlhf.trainer.ppo.checks import name_prompts
from openrlhf.trainer.ppo.clock import PhaseClock
from openrlhf.trainer.ppo.collecting import Collected, Collector
from openrlhf.trainer.ppo.evaluation import Evaluator
from openrlhf.trainer.ppo.experience import ExperienceMaker, Experiences
from openrlhf.trainer.ppo.prompt_stream import PromptStream
from openrlhf.trainer.ppo.roles import Roles
from openrlhf.trainer.ppo.sample_log import Scored, is_kept
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker

OF_EACH_ROLE = ("lr", "grad_norm", "skipped_steps", "aux_loss")
"""Metrics that the policy and the critic both have."""


def steps_per_episode(config: PPOConfig, prompts: int) -> int:
    """Return the rollout steps of one pass over the prompts; the last may be short."""
    return math.ceil(prompts / config.rollout.rollout_batch_size)


class PPOLoop:
    """Trains a policy on its own samples.

    Args:
        config: the run.
        roles: groups of workers.
        engine: who samples.
        weight_sync: who carries new weights to the engine.
        maker: who turns rollouts into experiences.
        prompts: all training prompts.
        evaluator: evaluation prompts and the log of samples.
        callbacks: what happens between rollout steps.

    Attributes:
        global_step: rollout steps done since the run began; also the version of the policy's weights.
        epoch_ended: whether the last step took the last prompts of a pass over them.
        evaluating: whether the evaluation after the last step was begun and not finished.
        evaluated_at: the step of the last evaluation that was finished.
        kept_as: what its answers are kept as in ``samples.jsonl``; nothing where they are not.
        learned: the samples that the last step learned from.
        dropped: uids of the prompts that the last step asked and a filter left out.
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        engine: RolloutEngine,
        weight_sync: WeightSync,
        maker: ExperienceMaker,
        prompts: Sequence[Prompt],
        evaluator: Evaluator,
        callbacks: Sequence[Callback] = (),
    ):
        if not len(prompts):
            raise DataError("there are no prompts to train on")
        self.config, self.roles, self.maker, self.evaluator = config, roles, maker, evaluator
        self.clock = PhaseClock()
        self.collector = Collector(config, engine, weight_sync, maker.rater, self.clock)
        self.callbacks = Callbacks(callbacks)
        self.stream = PromptStream(prompts, config.batch.seed, config.rollout.num_episodes)
        self.global_step = 0
        self.epoch_ended = False
        self.evaluating = False
        self.evaluated_at: int | None = None
        self.kept_as = ""
        self.learned: list[Rollout] = []
        self.dropped: Sequence[str] = ()

    @property
    def prompts(self) -> Sequence[Prompt]:
        """All training prompts: those of the stream, which gives them out."""
        return self.stream.prompts

    @property
    def steps_per_epoch(self) -> int:
        """Rollout steps of one pass over the prompts."""
        return steps_per_episode(self.config, len(self.prompts))

    @property
    def max_steps(self) -> int:
        """Rollout steps of the run; with dynamic filtering the most that the prompts that are left may give."""
        return self.global_step + self.stream.steps_left(self.config.rollout.rollout_batch_size)

    @property
    def max_epochs(self) -> int:
        """Passes over the prompts."""
        return self.config.rollout.num_episodes

    @property
    def epoch(self) -> int:
        """The pass, counted from 1, of the rollout step that was done last."""
        return max(0, self.stream.position - 1) // len(self.prompts) + 1

    @property
    def eval_data(self) -> list[Prompt]:
        """The evaluation prompts."""
        return self.evaluator.prompts

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The figure of an evaluation that says which step was best, and that higher wins.

        By default it is the true score if there is one, else the reward, over the prompts of all sources.
        """
        if self.config.evaluation.best_metric_key:
            return self.config.evaluation.best_metric_key, True
        figure = "true_score" if self.config.evaluation.eval_reward_func else "reward"
        return f"{figure}_t{self.config.evaluation.eval_temperature[0]:g}", True

    def fit(self) -> None:
        """Train from the present position, which a checkpoint may have set, to the end of the last episode.

        Raises ``Preempted`` when the run was asked to stop: a rollout or an evaluation that is under way is dropped,
        since its seeds repeat it, an update is finished, and the last whole step is saved.
        """
        with signals.interruptible():
            self.callbacks.restore(self)
        with signals.held(), self.saved_when_stopped():
            self.callbacks.on_start(self)
            self.evaluator.samples.start(self.global_step)
            if self.evaluating or (self.eval_data and self.global_step == 0):
                self.evaluate()
            for prompts in self.prompt_batches():
                self._step(prompts)
            self.leave_if_asked()
            self.callbacks.on_end(self)

    def _step(self, prompts: list[Prompt]) -> None:
        """Do one rollout step."""
        self.clock.restart()
        with rewound_when_stopped(), signals.droppable(self.roles.comm):
            batch = self.collector.collect(prompts, self.global_step, self.stream.ahead)
            if batch.rollouts:
                with self.clock.phase("make_experience", self.global_step):
                    experiences = self.maker.make(batch.rollouts, batch.greedy, batch.rated)
        if not batch.rollouts:
            self._pass_over(batch)
            return
        with self.clock.phase("train", self.global_step):
            learned = self.update(experiences)
        self.global_step += 1
        self._move(batch.drawn)
        self.learned, self.dropped = experiences.rollouts, batch.dropped
        self._keep_samples(experiences)
        metrics = {**experiences.metrics, **batch.metrics, **learned, **self.clock.times()}
        self.callbacks.on_step_end(self, metrics)

    def leave_if_asked(self) -> None:
        """Raise ``Preempted`` on all ranks when one was asked to stop."""
        if signals.agreed(self.roles.comm):
            raise Preempted("asked to stop")

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save what would be lost when the block is left because the run was asked to stop, and say how to go on."""
        try:
            yield
        except (Preempted, KeyboardInterrupt):
            if not signals.requested():
                raise
            how = self.callbacks.on_stop(self)
            raise Preempted(f"stopped by {signals.requested()} after step {self.global_step}; {how}") from None

    def prompt_batches(self) -> Iterator[list[Prompt]]:
        """Yield the prompts of the steps that are left; every episode has an order of its own."""
        while self.stream.left:
            yield self.stream.ahead(self.config.rollout.rollout_batch_size)

    def _move(self, drawn: int) -> None:
        """Take ``drawn`` prompts out of the stream."""
        episode = self.stream.episode
        self.stream.position += drawn
        self.epoch_ended = self.stream.episode > episode

    def update(self, experiences: Experiences) -> dict[str, float]:
        """Train the policy and the critic, at once unless they share devices; return their metrics over all ranks.

        A NumericError of one role ends the run before anything is saved, so it does not matter that the other role
        may have learned from the same samples: a resume has neither.
        """
        step, pending = self.global_step + 1, []
        if self.roles.critic:
            with self._naming("critic", experiences):
                futures = self.roles.critic.run(CriticWorker.update, experiences.shards, rollout=step)
                if self.roles.shared:
                    self.roles.critic.get(futures)
            pending.append(("critic", self.roles.critic, futures))
        if step > self.config.algorithm.freezing_actor_steps or not self.roles.critic:
            with self._naming("actor", experiences):
                futures = self.roles.policy.run(
                    PolicyWorker.update, experiences.shards, rollout=step, whiten=experiences.whiten,
                    kl_coef=experiences.kl_coef,
                )  # fmt: skip
            pending.append(("actor", self.roles.policy, futures))
        metrics: dict[str, float] = {}
        for role, group, futures in pending:
            with self._naming(role, experiences):
                learned = group.get(futures)[0]
            own = {f"{role}_{name}": learned.pop(name) for name in OF_EACH_ROLE if name in learned}
            metrics |= {**learned, **own}
        self.maker.kl_controller.update(experiences.kl, len(experiences.rollouts))
        return metrics

    def before_export(self) -> None:
        """An export holds nothing beside the weights."""

    @contextmanager
    def _naming(self, role: str, experiences: Experiences) -> Iterator[None]:
        """Add the role and the prompts to a NumericError, of which the workers know the sample numbers only."""
        try:
            yield
        except NumericError as error:
            who = name_prompts(experiences.rollouts, error.rows)
            where = f"rollout step {self.global_step + 1}, {role}"
            raise NumericError(f"{where}, {error}. The samples answer {who}", error.rows) from error

    def evaluate(self) -> dict[str, float]:
        """Return the figures on the evaluation prompts, and tell the callbacks unless they know those of this step."""
        when = self._when()
        self.evaluating = True
        with rewound_when_stopped(), signals.droppable(self.roles.comm):
            self.collector.serve(self.global_step)
            values = self.evaluator.evaluate(self.global_step, when)
        self.evaluating, self.kept_as = False, when
        if self.evaluated_at != self.global_step:
            self.evaluated_at = self.global_step
            self.callbacks.on_evaluate(self, values)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the driver's part of a checkpoint, for JSON: position, KL coefficient, and what both rest on."""
        return {
            "global_step": self.global_step,
            "prompts_taken": self.stream.position,
            "evaluating": self.evaluating,
            "evaluated_at": self.evaluated_at,
            "kept_as": self.kept_as,
            "kl_controller": self.maker.kl_controller.state_dict(),
            "callbacks": self.callbacks.state_dict(),
            "data": self._data_facts(),
        }

    def load_state_dict(self, state: Mapping[str, Any], allow_change: bool = False) -> None:
        """Take up a saved position; raise UsageError when it counts steps of other prompts or batches.

        ``allow_change`` lets the prompts and the flags be others, as long as an episode has as many steps.
        """
        check_position(state["data"], self._data_facts(), "--prompt_data", allow_change)
        self.global_step = int(state["global_step"])
        self.stream.position = int(state["prompts_taken"])
        self.evaluating = bool(state.get("evaluating", False) and self.eval_data)
        self.evaluated_at = state.get("evaluated_at")
        self.kept_as = state.get("kept_as", "")
        self.maker.kl_controller.load_state_dict(state["kl_controller"])
        self.callbacks.load_state_dict(state.get("callbacks", {}))

    def _data_facts(self) -> dict[str, Any]:
        return {"rows": len(self.prompts), "data": self._fingerprint, "steps_per_epoch": self.steps_per_epoch}

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.prompts)

    def _pass_over(self, batch: Collected) -> None:
        """Go on without a step after the last prompts of an episode, whose groups were all left out.

        Raises DataError when those were all prompts of the episode: the next one would ask the same weights for the
        same samples.
        """
        OURS.warning(
            "no group of the last %d prompts of episode %d passed the filter", batch.drawn, self.stream.episode + 1
        )
        if batch.drawn == len(self.prompts):
            raise DataError(self._nothing_passes())
        self._move(batch.drawn)
        self.learned, self.dropped = [], batch.dropped
        self.callbacks.on_pass_over(self)
        known = self.evaluated_at == self.global_step
        if known and self.kept_as == "during" and not self.stream.left:
            # The step turned out to be the last: its answers are there already.
            self.evaluator.samples.rename(self.global_step, "during", "after")
            self.kept_as = "after"
        elif self.eval_data and (not self.stream.left or (self.config.logging.eval_steps == -1 and not known)):
            self.evaluate()

    def _nothing_passes(self) -> str:
        """Save the last step, and return why there is none after it and what to do."""
        low, high = self.config.rollout.filtering_range
        kept = f" after step {self.global_step} ({self.callbacks.on_stop(self)})" if self.global_step else ""
        return (
            f"--dynamic_filtering left nothing to learn from{kept}: all {len(self.prompts):,} prompts were asked, and "
            f"no group of answers has a mean score between {low:g} and {high:g}. Set "
            "--dynamic_filtering_reward_range, or use prompts that are neither too easy nor too hard"
        )

    def _keep_samples(self, made: Experiences) -> None:
        """Write some of the answers that were learned from, with the figures of their tokens."""
        if not is_kept(self.global_step, self.max_steps):
            return
        rollout = self.config.rollout
        scored = Scored(
            made.rollouts, made.scores, made.true_scores, made.parts, rollout.temperature, rollout.n_samples_per_prompt
        )
        starts = {sample: len(made.rollouts[sample].prompt.token_ids) for sample in scored.shown}
        policy, most = self.roles.policy, scored.most_tokens
        asked = policy.run(PolicyWorker.token_columns, made.shards, starts=starts, most=most, whiten=made.whiten)
        learned = {sample: columns for found in policy.get(asked) for sample, columns in found.items()}
        self.evaluator.samples.write("train", self.global_step, scored, learned)

    def _when(self) -> str:
        """Return what the answers of an evaluation are kept as; nothing where they are not kept."""
        step, total = self.global_step, self.max_steps
        if step in (0, total):
            return "before" if step == 0 else "after"
        every = self.config.logging.eval_steps if self.config.logging.eval_steps > 0 else self.steps_per_epoch
        return "during" if self.evaluated_at != step and is_kept(step // every, total // every) else ""
