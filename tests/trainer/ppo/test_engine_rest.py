"""When the engine is awake: while it samples, never while models score, learn or are saved; and what it is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from openrlhf.config.ppo import EvalConfig, RewardConfig
from openrlhf.rollout.engine import CACHE, WEIGHTS
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.trainer.callbacks import Callback, Callbacks
from openrlhf.trainer.ppo.loop import PPOLoop
from openrlhf.trainer.ppo.policy_engine import PolicyEngine
from tests.trainer.ppo.harness import local_loop, reward_file, tiny_ppo_config, with_algorithm, with_rollout

ONE_OF_THREE = (
    "def reward_func(queries, prompts, labels):\n"
    "    return [float(int(label) % 3 == 1 and row % 2 == 0) for row, label in enumerate(labels)]\n"
)


class SleepyEngine(PolicyEngine):
    """The policy as an engine that minds its memory; ``journal`` tells what happened in which order."""

    def __init__(self, policy: Any):
        super().__init__(policy)
        self.awake: list[str] = []
        self.journal: list[str] = []

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        assert self.awake == [WEIGHTS, CACHE]
        self.journal.append("generate")
        return super().generate(prompts, sampling)

    def push(self, version: int) -> None:
        assert self.awake == [WEIGHTS]
        self.journal.append(f"push {version}")
        super().push(version)

    def sleep(self) -> None:
        self.awake = []

    def wake_up(self, part: str) -> None:
        self.awake += [part] * (part not in self.awake)


class Saving(Callback):
    """Stands for a checkpoint after every step."""

    def __init__(self, at_rest):
        self._at_rest = at_rest

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        self._at_rest("save")


def sleepy_loop(config, **counts) -> tuple[PPOLoop, SleepyEngine]:
    """Return a loop that fails where something else than the engine works while that one is awake."""
    loop, _ = local_loop(config, **counts)
    engine = SleepyEngine(loop.roles.policy)
    loop.collector.engine = loop.collector.weight_sync = loop.evaluator.engine = engine

    def at_rest(what: str) -> None:
        assert not engine.awake, what
        engine.journal.append(what)

    loop.callbacks = Callbacks([loop.callbacks, Saving(at_rest)])
    for owner, name in ((loop.maker.rater, "rate"), (loop.maker, "make"), (loop, "update")):
        method = getattr(owner, name)
        setattr(owner, name, lambda *given, _m=method, _n=name: (at_rest(_n), _m(*given))[1])
    return loop, engine


def test_the_engine_gets_new_weights_only_when_it_is_to_sample_and_sleeps_else(tmp_path):
    config = replace(tiny_ppo_config(tmp_path), evaluation=EvalConfig(eval_temperature=(1.0, 0.0)))
    loop, engine = sleepy_loop(config, prompts=16, eval_prompts=2)
    loop.fit()
    evaluation, step = ["generate", "generate", "rate", "rate"], ["generate", "make", "rate", "update"]
    assert engine.journal == [
        *("push 0", *evaluation, *step, "save"),
        *("push 1", *step, "push 2", *evaluation, "save"),
    ]


def test_prompts_that_a_filter_asks_for_more_are_answered_with_the_weights_that_are_there(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="group_norm", init_kl_coef=0.0)
    config = replace(config, reward=RewardConfig(remote_rm_url=reward_file(tmp_path, ONE_OF_THREE)))
    config = with_rollout(config, rollout_batch_size=2, n_samples_per_prompt=2, dynamic_filtering=True)
    loop, engine = sleepy_loop(config, prompts=12)
    loop.fit()
    waves, pushes = engine.journal.count("generate"), [event for event in engine.journal if event.startswith("push")]
    assert waves == engine.journal.count("rate") > len(pushes) > 1
    assert pushes == [f"push {version}" for version in range(len(pushes))]


def test_a_step_that_nobody_samples_after_sends_no_weights(tmp_path):
    loop, engine = sleepy_loop(tiny_ppo_config(tmp_path), prompts=8)
    loop.fit()
    assert [event for event in engine.journal if event.startswith("push")] == ["push 0"]
