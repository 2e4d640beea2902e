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
from openrlhf.trainer.callbacks import Callbacks
from openrlhf.trainer.ppo.filtering import fill, passing
from openrlhf.trainer.ppo.ledger import Ledger
from openrlhf.trainer.ppo.prompt_stream import PromptStream
from openrlhf.trainer.ppo.rating import Rated
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


def passing_first(loop, count: int) -> None:
    """Have the prompts whose groups pass come first in every episode over ``count`` prompts."""
    ordered = sorted(loop.prompts, key=lambda prompt: int(prompt.uid) % 3 != 1)
    loop.stream.ahead = lambda number, skipped=0: (
        ordered[loop.stream.position % count + skipped :][:number] if loop.stream.left else []
    )


@pytest.mark.parametrize(
    ("every", "told"), [(-1, [0, 4, 8]), (1, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (3, [0, 3, 6, 8]), (8, [0, 8])]
)
def test_where_the_rest_of_an_episode_is_left_out_its_evaluation_is_told_once(tmp_path, every, told):
    config = filtering_config(tmp_path, rollout_batch_size=1, num_episodes=2)
    config = replace(config, evaluation=EvalConfig(eval_temperature=(0.0,)))
    config = replace(config, logging=replace(config.logging, eval_steps=every))
    loop, recorder = local_loop(config, prompts=12, eval_prompts=2)
    passing_first(loop, 12)
    loop.fit()
    assert (loop.global_step, loop.stream.left) == (8, 0)
    assert [step for step, _ in recorder.evaluations] == told
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    kept = [(line["when"], line["step"]) for line in lines if line["when"] != "train"]
    assert [one for one in kept if one[0] != "during"] == [("before", 0)] * 2 + [("after", 8)] * 2
    during = [one for one in kept if one[0] == "during"]
    assert during == [("during", step) for step in told if step not in (0, 8) for _ in range(2)]


def test_a_resumed_run_does_not_tell_an_evaluation_again(tmp_path):
    config = filtering_config(tmp_path, rollout_batch_size=1, num_episodes=1)
    config = replace(config, evaluation=EvalConfig(eval_temperature=(0.0,)))
    config = replace(config, logging=replace(config.logging, eval_steps=1))
    config = replace(config, checkpoint=replace(config.checkpoint, save_steps=1))
    loop, _ = local_loop(config, prompts=12, eval_prompts=2)
    passing_first(loop, 12)
    loop.fit()
    config = replace(config, checkpoint=replace(config.checkpoint, load_checkpoint=True))
    again, recorder = local_loop(config, prompts=12, eval_prompts=2)
    passing_first(again, 12)
    again.fit()
    assert again.global_step == 4 and recorder.steps == recorder.evaluations == []


def test_a_filter_that_lets_nothing_pass_is_an_error_after_one_episode(tmp_path):
    loop, recorder = local_loop(filtering_config(tmp_path, NONE, num_episodes=3), prompts=8)
    asked = []
    generate = loop.collector.engine.generate
    loop.collector.engine.generate = lambda prompts, sampling: asked.extend(prompts) or generate(prompts, sampling)
    with pytest.raises(DataError, match="mean score between 0 and 1. Set --dynamic_filtering_reward_range"):
        loop.fit()
    assert recorder.steps == [] and len(asked) == 8


def test_when_nothing_passes_any_more_the_last_step_is_kept(tmp_path):
    counted = (
        "calls = []\n"
        "def reward_func(queries, prompts, labels):\n"
        "    calls.append(1)\n"
        "    return [float(len(calls) == 1 and row % 2 == 0) for row in range(len(queries))]\n"
    )
    loop, recorder = local_loop(filtering_config(tmp_path, counted, num_episodes=3), prompts=4)
    with pytest.raises(DataError, match="nothing to learn from after step 1 .*--load_checkpoint.*all 4 prompts"):
        loop.fit()
    assert [step["step"] for step in recorder.steps] == [1]
    assert (tmp_path / "ckpt" / "global_step1" / "manifest.json").is_file()


def ledger_of(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]


def test_the_ledger_has_every_prompt_once_an_episode_as_learned_from_or_dropped(tmp_path):
    loop, recorder = local_loop(filtering_config(tmp_path), prompts=26)
    loop.callbacks = Callbacks([loop.callbacks, Ledger(tmp_path / "ledger.jsonl")])
    loop.fit()
    lines, seen = ledger_of(tmp_path), []
    for line in lines:
        seen += [*line["samples"], *line["dropped"]]
        assert len(seen) == line["taken"]
        assert all(int(uid) % 3 == 1 for uid in line["samples"])
        assert all(int(uid) % 3 != 1 for uid in line["dropped"])
    assert sorted(seen[:26], key=int) == sorted(seen[26:], key=int) == [str(n) for n in range(26)]
    assert [line["step"] for line in lines if line["samples"]] == [step["step"] for step in recorder.steps]


@pytest.mark.parametrize("position", [0, 4, 12, 24])
def test_the_ledger_of_a_run_that_goes_on_keeps_what_is_not_asked_again(tmp_path, position):
    loop, _ = local_loop(filtering_config(tmp_path, rollout_batch_size=1), prompts=12)
    passing_first(loop, 12)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    loop.callbacks = Callbacks([loop.callbacks, ledger])
    loop.fit()
    lines = ledger_of(tmp_path)
    # Each episode: four steps, and then the rest without one.
    assert [(line["step"], line["taken"]) for line in lines] == [
        *((1, 1), (2, 2), (3, 3), (4, 4), (4, 12), (5, 13), (6, 14), (7, 15), (8, 16), (8, 24)),
    ]
    loop.stream.position = position
    ledger.on_start(loop)
    assert ledger_of(tmp_path) == [line for line in lines if line["taken"] <= position]


def test_the_time_to_score_what_a_filter_judges_is_that_of_making_experiences(tmp_path):
    slow = "import time\n" + HALF.replace("    return", "    time.sleep(0.5)\n    return")
    loop, recorder = local_loop(filtering_config(tmp_path, slow, num_episodes=1), prompts=12)
    loop.fit()
    assert all(step["time/make_experience"] > 0.5 for step in recorder.steps)


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
    stopped.maker.rater.reward_function = StoppingReward(stopped.maker.rater.reward_function, at)
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
