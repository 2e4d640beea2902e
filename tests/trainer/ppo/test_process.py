"""Process rewards in PPO: where the steps end, what they get, and what the estimators make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from openrlhf.config.arguments import parse
from openrlhf.config.ppo import RewardConfig
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.errors import UsageError
from openrlhf.ray.placement import Placement
from openrlhf.trainer.ppo.process import ProcessRewardWorker, step_tokens
from openrlhf.trainer.ppo.rating import Rated
from openrlhf.trainer.ppo.shards import shard
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import (
    local_loop,
    reward_file,
    rollout_of,
    solo_strategy,
    tiny_ppo_config,
    tiny_prompts,
    with_algorithm,
    with_batch,
    with_rollout,
)
from tests.trainer.ppo.test_experience import CONSTANT, ThreeShards

EOS = 2


def process_config(folder, outcome: str | None = None, **algorithm):
    """Return a run with a process reward model, whose steps end with an e, and an ``outcome`` reward file."""
    config = with_algorithm(tiny_ppo_config(folder), init_kl_coef=0.0, **algorithm)
    if not (folder / "prm").is_dir():
        tiny_folder(folder / "prm", seed=1)
    source = outcome and reward_file(folder, CONSTANT.format(values=outcome))
    flags = {"prm_placeholder_token": "e", "prm_reward_tokens": ("+", "-")}
    return replace(config, reward=RewardConfig(remote_rm_url=source, prm_pretrain=str(folder / "prm"), **flags))


def answers_of(tokenizer, prompts: int = 2, each: int = 2) -> list:
    """Return rollouts with 2, 1, 0, 3, ... steps; the first ends with the end of a step."""
    e, x = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ex")
    found = [[x, e, x, x, e], [x, e, EOS], [x, x, EOS], [e, e, x, e, EOS]]
    asked = tiny_prompts(tokenizer, prompts)
    return [rollout_of(prompt, found[(row * each + n) % 4]) for row, prompt in enumerate(asked) for n in range(each)]


def expected_steps(config, rollouts, tokens) -> list[list[float]]:
    """Return the scores of the steps of each answer, one answer at a time with plain torch."""
    model = AutoModelForCausalLM.from_pretrained(config.reward.prm_pretrain, dtype=torch.float32)
    steps = []
    for rollout in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.token_ids])).logits[0, :, tokens.rewards].softmax(dim=-1)[:, 0]
        begin = len(rollout.prompt.token_ids)
        ends = [place for place, token in enumerate(rollout.token_ids) if token == tokens.placeholder]
        steps.append([float(logits[place]) for place in ends if place >= begin])
    return steps


@pytest.mark.parametrize("budget", [0, 40])
def test_a_step_gets_the_probability_of_the_positive_token_where_it_ends(tmp_path, budget):
    config = with_rollout(process_config(tmp_path), micro_rollout_batch_size=3)
    if budget:
        config = with_batch(config, use_dynamic_batch=True, train_max_tokens_per_gpu=budget)
    worker = ProcessRewardWorker(config, solo_strategy(config))
    rollouts = answers_of(worker.tokenizer)
    assert any("e" in rollout.prompt.text for rollout in rollouts)
    expected = expected_steps(config, rollouts, worker.tokens)
    assert [len(row) for row in expected] == [2, 1, 0, 3]
    found = [row for part in worker.score(shard(rollouts, 2, 0)) for row in part]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def action_rows(made, name: str) -> dict[int, list[float]]:
    """Return the values on the actions of every sample."""
    return {
        sample: getattr(part, name)[row][part.action_mask[row]].tolist()
        for part in made.shards
        for row, sample in enumerate(part.sample.tolist())
    }


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "dr_grpo"])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_learned_from_is_what_comes_after_an_action_less_the_baseline(tmp_path, estimator, shards):
    config = process_config(tmp_path, "4.0, 1.0, 0.0, 30.0", advantage_estimator=estimator)
    config = with_rollout(config, n_samples_per_prompt=2)
    loop, _ = local_loop(with_batch(config, use_dynamic_batch=shards > 1))
    if shards > 1:
        loop.maker.roles = loop.maker.rater.roles = replace(loop.roles, policy=ThreeShards(loop.roles.policy.worker))
    tokens = step_tokens(config, loop.maker.rater.tokenizer)
    rollouts = answers_of(loop.maker.rater.tokenizer)
    steps = expected_steps(config, rollouts, tokens)
    loop.maker.config = replace(loop.maker.config, vllm=replace(config.vllm, sync_tolerance=1e9))
    made = loop.maker.make(rollouts)
    clipped = torch.tensor([4.0, 1.0, 0.0, 10.0]) + torch.tensor([sum(row) for row in steps])
    pairs = clipped.view(-1, 2)
    baseline = {
        "reinforce": torch.zeros(4),
        "rloo": pairs.flip(1),
        "dr_grpo": pairs.mean(1, keepdim=True).expand(2, 2),
    }
    worth = clipped - baseline[estimator].flatten()
    found = action_rows(made, "returns")
    for sample, rollout in enumerate(rollouts):
        left, expected, at = float(worth[sample]), [], iter(steps[sample])
        for token in rollout.response_ids:
            expected.append(left)
            left -= next(at) if token == tokens.placeholder else 0.0
        assert found[sample] == pytest.approx(expected, abs=1e-4)
    assert made.scores == pytest.approx([s + sum(row) for s, row in zip((4, 1, 0, 30), steps, strict=True)], abs=1e-4)
    assert made.metrics["steps_per_answer"] == 1.5
    assert made.metrics["step_reward"] == pytest.approx(sum(map(sum, steps)) / 6, abs=1e-5)


def test_a_policy_learns_to_end_steps_that_are_rewarded(tmp_path):
    config = process_config(tmp_path, advantage_estimator="rloo")
    config = with_rollout(config, num_episodes=10, rollout_batch_size=32, n_samples_per_prompt=4, generate_max_len=8)
    config = replace(config, optim=replace(config.optim, actor_learning_rate=1e-2))
    loop, recorder = local_loop(with_batch(config, train_batch_size=128, micro_train_batch_size=64), prompts=32)
    loop.fit()
    rewards = [step["reward"] for step in recorder.steps]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5
    assert recorder.steps[-1]["steps_per_answer"] > recorder.steps[0]["steps_per_answer"]


def test_gae_with_a_critic_runs_on_process_rewards_alone(tmp_path):
    loop, recorder = local_loop(process_config(tmp_path, advantage_estimator="gae", lambd=0.95))
    loop.fit()
    assert [step["step"] for step in recorder.steps] == [1, 2]
    assert {"critic_loss", "explained_variance", "steps_per_answer"} <= set(recorder.steps[0])


def test_rated_answers_keep_their_steps_when_some_are_chosen(tmp_path):
    loop, _ = local_loop(with_rollout(process_config(tmp_path), n_samples_per_prompt=2))
    rated = loop.maker.rater.rate(answers_of(loop.maker.rater.tokenizer))
    chosen = Rated.join([rated.select([3]), rated.select([0, 1])])
    assert chosen.steps == [rated.steps[row] for row in (3, 0, 1)]
    assert chosen.of_steps.tolist() == pytest.approx([sum(row) for row in chosen.steps], abs=1e-6)


COMMAND = ["--pretrain", "model", "--prompt_data", "rows.jsonl", "--prm_pretrain", "prm"]
TOKENS = ["--prm_placeholder_token", "e", "--prm_reward_tokens", "+", "-"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (TOKENS[2:], "--prm_placeholder_token"),
        (TOKENS[:2], "--prm_reward_tokens"),
        ([*TOKENS[:3], "+", "+"], "--prm_reward_tokens"),
        ([*TOKENS, "--advantage_estimator", "group_norm", "--n_samples_per_prompt", "2"], "divides by the spread"),
    ],
)
def test_what_a_process_reward_model_needs_is_said(words, problem):
    with pytest.raises(UsageError) as caught:
        parse(RayPPOConfig, [*COMMAND, *words], "train_ppo_ray")
    assert len(caught.value.problems) == 1 and problem in caught.value.problems[0]


def test_every_kind_of_reward_is_named_where_there_is_none():
    with pytest.raises(UsageError) as caught:
        parse(RayPPOConfig, COMMAND[:4], "train_ppo_ray")
    assert all(name in caught.value.problems[0] for name in ("--reward_pretrain", "--remote_rm_url", "--prm_pretrain"))


def test_a_process_reward_model_is_reward_enough_and_placed_as_one():
    words = [*COMMAND, *TOKENS, "--reward_num_gpus_per_node", "2", "--actor_num_gpus_per_node", "1"]
    placement = Placement.from_config(parse(RayPPOConfig, words, "train_ppo_ray")[0])
    assert placement.role("prm").workers == 2 and placement.rewards == ()
    critic = ["--colocate_critic_reward", "--critic_num_gpus_per_node", "1"]
    with pytest.raises(UsageError, match="must equal --reward_num_nodes 1 --reward_num_gpus_per_node 2"):
        Placement.from_config(parse(RayPPOConfig, [*words, *critic], "train_ppo_ray")[0])


@pytest.mark.parametrize(("placeholder", "problem"), [("<|im_end|>", "ends an answer"), ("e e", "tokens")])
def test_a_placeholder_that_cannot_end_steps_is_refused(tmp_path, placeholder, problem):
    config = process_config(tmp_path)
    config = replace(config, reward=replace(config.reward, prm_placeholder_token=placeholder))
    with pytest.raises(UsageError, match=problem):
        ProcessRewardWorker(config, solo_strategy(config))
