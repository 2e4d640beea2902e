"""The samples of a rollout step: generated, with a filter rated and replaced too, by an engine that sleeps else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from openrlhf.config.ppo import PPOConfig
from openrlhf.rollout.engine import CACHE, WEIGHTS, RolloutEngine, WeightSync
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.strategy import signals
from openrlhf.trainer.ppo.clock import PhaseClock
from openrlhf.trainer.ppo.filtering import fill
from openrlhf.trainer.ppo.rating import Rated, Rater


class Collected(NamedTuple):
    """The samples of a rollout step.

    Attributes:
        rollouts: samples of one prompt next to each other; none when a filter left no group.
        drawn: prompts that were asked.
        greedy: one greedy answer to each prompt, where the estimator needs them.
        rated: what the reward sources said, where they were asked already.
        dropped: uids of the prompts whose answers a filter left out.
        metrics: of how the samples came about.
    """

    rollouts: list[Rollout]
    drawn: int
    greedy: list[Rollout] | None = None
    rated: Rated | None = None
    dropped: Sequence[str] = ()
    metrics: Mapping[str, float] = {}


class Collector:
    """Collects samples from an engine, which it gives new weights and wakes up for that.

    Args:
        config: the run.
        engine: who samples.
        weight_sync: who carries new weights to the engine.
        rater: who scores what a filter judges.
        clock: counts the seconds.
    """

    def __init__(
        self, config: PPOConfig, engine: RolloutEngine, weight_sync: WeightSync, rater: Rater, clock: PhaseClock
    ):
        self.config, self.engine, self.weight_sync = config, engine, weight_sync
        self.rater, self.clock = rater, clock
        self._served: int | None = None

    def collect(self, prompts: list[Prompt], version: int, more: Callable[[int, int], list[Prompt]]) -> Collected:
        """Return the samples to learn from: the answers to ``prompts``, or with dynamic filtering what passed.

        Args:
            prompts: the first ones.
            version: of the policy's weights: the rollout steps that were done.
            more: what :func:`~openrlhf.trainer.ppo.filtering.fill` asks for fresh prompts.
        """
        rollout = self.config.rollout
        if not rollout.dynamic_filtering:
            rollouts, greedy = self.generate(prompts, version)
            return Collected(rollouts, len(prompts), greedy)
        filled = fill(rollout, prompts, lambda wave: self._rated(wave, version), more)
        metrics = {"dynamic_filtering_pass_rate": filled.pass_rate, "prompts_drawn": float(filled.drawn)}
        rollouts = filled.rated.rollouts if filled.rated else []
        return Collected(rollouts, filled.drawn, None, filled.rated, filled.dropped, metrics)

    def _rated(self, wave: list[Prompt], version: int) -> Rated:
        """Return the answers to ``wave`` with their scores."""
        rollouts, _ = self.generate(wave, version)
        with self.clock.phase("make_experience", version):
            return self.rater.rate(rollouts)

    def generate(self, prompts: list[Prompt], version: int) -> tuple[list[Rollout], list[Rollout] | None]:
        """Return the samples, and one greedy answer a prompt where the estimator needs it."""
        rollout = self.config.rollout
        sampling = SamplingParams(
            max_new_tokens=rollout.generate_max_len,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            n=rollout.n_samples_per_prompt,
            seed=self.config.batch.seed,
            step=version + 1,
        )
        self.serve(version)
        with self.clock.phase("generate", version):
            rollouts, greedy = self.engine.generate(prompts, sampling), None
            if self.config.algorithm.estimator.needs_greedy:
                greedy = self.engine.generate(prompts, replace(sampling, temperature=0.0, top_p=1.0, n=1))
            self.engine.sleep()
        return rollouts, greedy

    def serve(self, version: int) -> None:
        """Have the engine awake with the weights of ``version``, the present ones, which are pushed if it has others.

        Not before it is to sample: after a step others want the room that the engine takes, such as a checkpoint, for
        which the states of the optimizer are on the device. The room for its cache is taken last: carrying the
        weights takes room too. A push is never left half done.
        """
        with self.clock.phase("sync", version), signals.held():
            self.engine.wake_up(WEIGHTS)
            if self._served != version:
                self.weight_sync.push(version)
                self._served = version
            self.engine.wake_up(CACHE)
