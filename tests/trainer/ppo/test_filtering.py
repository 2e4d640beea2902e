"""Groups that teach nothing are replaced by fresh prompts, and nothing that passed is lost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from openrlhf.config.ppo import EvalConfig, RewardConfig, RolloutConfig
from openrlhf.errors import DataError, Preempted
from openrlhf.rollout.types import Prompt
from openrlhf.strategy import signals
from openrlhf.trainer.ppo.experience import Rated
from openrlhf.trainer.ppo.filtering import fill, passing
from openrlhf.trainer.ppo.prompt_stream import PromptStream
from tests.trainer.ppo.harness import (
    local_loop,
    policy_weights,
    reward_file,
    rollout_of,
    tiny_ppo_config,
    with_algorithm,
    with_rollout,
)

# Two answers to a prompt: those of every third prompt are both right, of every third both wrong.
HALF = (
    "def reward_func(queries, prompts, labels):\n"
    "    return [float(int(label) % 3 == 0 or (int(label) % 3 == 1 and row % 2 == 0))\n"
    "            for row, label in enumerate(labels)]\n"
)
NONE = "def reward_func(queries, prompts, labels):\n    return [0.0] * len(queries)\n"


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(str(n), f"prompt {n}", (1, 2), label=str(n)) for n in range(count)]


def answered(prompts: list[Prompt]) -> Rated:
    """Two answers to each prompt with the rewards of ``HALF``."""
    rollouts = [rollout_of(prompt, [5]) for prompt in prompts for _ in range(2)]
    numbers = [int(prompt.uid) for prompt in prompts]
    scores = [float(n % 3 == 0 or (n % 3 == 1 and k == 0)) for n in numbers for k in range(2)]
    return Rated(rollouts, torch.tensor(scores), {"rows": [float(n) for n in numbers for _ in range(2)]})


def asked(prompts: list[Prompt], size: int):
    """Fill a batch of ``size`` groups from ``prompts``; return it and the waves of uids that were asked."""
    waves = []

    def ask(wave):
        waves.append([int(prompt.uid) for prompt in wave])
        return answered(wave)

    config = RolloutConfig(rollout_batch_size=size, n_samples_per_prompt=2)
    return fill(config, prompts[:size], ask, lambda count, drawn: prompts[drawn : drawn + count]), waves


def test_as_many_fresh_prompts_are_asked_as_groups_are_missing_and_all_that_passed_are_kept():
    filled, waves = asked(prompts_of(20), 4)
    assert waves == [[0, 1, 2, 3], [4, 5, 6], [7, 8], [9], [10]]
    assert [int(rollout.prompt.uid) for rollout in filled.rated.rollouts] == [1, 1, 4, 4, 7, 7, 10, 10]
    assert filled.rated.scores.tolist() == [1.0, 0.0] * 4
    assert filled.rated.extra == {"rows": [1.0, 1.0, 4.0, 4.0, 7.0, 7.0, 10.0, 10.0]}
    assert (filled.drawn, filled.pass_rate) == (11, pytest.approx(100 * 4 / 11))


def test_where_the_data_ends_what_passed_is_a_short_batch():
    filled, _ = asked(prompts_of(6), 4)
    assert [int(rollout.prompt.uid) for rollout in filled.rated.rollouts] == [1, 1, 4, 4]
    assert filled.drawn == 6
    nothing, _ = asked([prompt for prompt in prompts_of(9) if int(prompt.uid) % 3], 1)
    assert nothing.rated is not None
    empty, _ = asked([prompt for prompt in prompts_of(9) if not int(prompt.uid) % 3], 4)
    assert (empty.rated, empty.drawn, empty.pass_rate) == (None, 3, 0.0)


def test_the_borders_of_the_range_do_not_pass_and_scores_go_before_rewards():
    rollouts = [rollout_of(prompt, [5]) for prompt in prompts_of(3) for _ in range(2)]
    scores = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert passing(Rated(rollouts, scores), 2, 0.0, 1.0) == [2, 3]
    assert passing(Rated(rollouts, scores), 2, -1.0, 0.5) == [0, 1]
    assert passing(Rated(rollouts, torch.zeros(6), {"scores": scores.tolist()}), 2, 0.0, 1.0) == [2, 3]


def test_the_stream_gives_every_prompt_once_an_episode_and_no_batch_reaches_over_its_end():
    stream, seen = PromptStream(prompts_of(5), 1, 2), []
    while stream.left:
        batch = stream.ahead(3)
        seen.append([prompt.uid for prompt in batch])
        assert [prompt.uid for prompt in stream.ahead(2, 1)] == seen[-1][1:3]
        assert stream.steps_left(3) == 5 - len(seen)
        stream.position += len(batch)
    assert [len(batch) for batch in seen] == [3, 2, 3, 2]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == sorted("01234")
    assert stream.ahead(3) == [] and stream.steps_left(3) == 0


def filtering_config(tmp_path, source: str = HALF, **rollout):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="group_norm", init_kl_coef=0.0)
    config = replace(config, reward=RewardConfig(remote_rm_url=reward_file(tmp_path, source)))
    shape = {"rollout_batch_size": 4, "n_samples_per_prompt": 2, "dynamic_filtering": True, "num_episodes": 2}
    return with_rollout(config, **{**shape, **rollout})


def test_a_run_with_a_filter_learns_from_full_batches_and_from_the_rest_of_each_episode(tmp_path):
    loop, recorder = local_loop(filtering_config(tmp_path), prompts=24, eval_prompts=3)
    learned = []
    make = loop.maker.make

    def watched(rollouts, greedy, rated):
        learned.append(rollouts)
        return make(rollouts, greedy, rated)

    loop.maker.make = watched
    assert loop.max_steps == 12
    loop.fit()
    groups = [[rollout.prompt.uid for rollout in rollouts[::2]] for rollouts in learned]
    # 8 of 24 prompts pass: 2 full batches an episode, each prompt once.
    assert [len(step) for step in groups] == [4, 4, 4, 4]
    assert sorted(groups[0] + groups[1], key=int) == [str(n) for n in range(1, 24, 3)]
    assert sorted(groups[0] + groups[1]) == sorted(groups[2] + groups[3]) and groups[:2] != groups[2:]
    assert all(step["zero_variance_groups"] == 0.0 and step["reward"] == 0.5 for step in recorder.steps)
    drawn = [step["prompts_drawn"] for step in recorder.steps]
    assert all(step["dynamic_filtering_pass_rate"] == pytest.approx(400 / n) for step, n in zip(recorder.steps, drawn))
    assert loop.global_step == loop.max_steps == 4 and loop.stream.left == 0
    assert [step for step, _ in recorder.evaluations][0] == 0 and recorder.evaluations[-1][0] == 4


def test_the_rest_of_an_episode_in_which_nothing_passes_ends_the_run_with_its_evaluation(tmp_path):
    config = filtering_config(tmp_path, rollout_batch_size=1, num_episodes=1)
    config = replace(config, evaluation=EvalConfig(eval_temperature=(0.0,)))
    loop, recorder = local_loop(config, prompts=12, eval_prompts=2)
    # The prompts that pass come first.
    loop.stream.prompts = sorted(loop.prompts, key=lambda prompt: int(prompt.uid) % 3 != 1)
    loop.stream.ahead = lambda count, skipped=0: loop.stream.prompts[loop.stream.position + skipped :][:count]
    loop.fit()
    assert (loop.global_step, loop.stream.left) == (4, 0)
    assert [step for step, _ in recorder.evaluations] == [0, 4]


def test_a_filter_that_lets_nothing_pass_is_an_error_that_names_the_range(tmp_path):
    loop, recorder = local_loop(filtering_config(tmp_path, NONE), prompts=8)
    with pytest.raises(DataError, match="mean score between 0 and 1. Set --dynamic_filtering_reward_range"):
        loop.fit()
    assert recorder.steps == []


class StoppingReward:
    """The reward function of a loop; the run is asked to stop when it scores for the ``at``-th time."""

    def __init__(self, function, at: int):
        self.function, self.at, self.calls = function, at, 0

    def score(self, *columns):
        self.calls += 1
        if self.calls == self.at:
            signals.ask("SIGTERM")
        return self.function.score(*columns)


@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_run_with_a_filter_goes_on_bit_for_bit(tmp_path, monkeypatch, at):
    config = filtering_config(tmp_path)
    whole, recorder = local_loop(config, prompts=24)
    whole.fit()

    monkeypatch.setattr(signals, "_state", signals._State())
    stopped, first = local_loop(config, prompts=24)
    stopped.maker.reward_function = StoppingReward(stopped.maker.reward_function, at)
    with pytest.raises(Preempted):
        stopped.fit()
    monkeypatch.setattr(signals, "_state", signals._State())
    resumed = replace(config, checkpoint=replace(config.checkpoint, load_checkpoint=True))
    loop, second = local_loop(resumed, prompts=24)
    loop.fit()

    assert 0 < len(second.steps) <= 4 and len(first.steps) + len(second.steps) == 4
    for one, other in zip(recorder.steps, [*first.steps, *second.steps], strict=True):
        timed = {name for name in one if name.startswith("time/")}
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    for name, weight in policy_weights(whole).items():
        assert torch.equal(weight, policy_weights(loop)[name])
    saved = sorted((tmp_path / "ckpt").glob("global_step*/manifest.json"))
    if saved:
        state = json.loads(saved[-1].read_text())["state"]
        assert state["prompts_taken"] == sum(int(step["prompts_drawn"]) for step in first.steps)
