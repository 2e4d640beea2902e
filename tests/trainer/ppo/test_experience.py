"""The driver's side: rewards, baselines, metrics and the check of the engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from openrlhf.config.ppo import PPOModelConfig, RewardConfig
from openrlhf.config.ppo_ray import VLLMConfig
from openrlhf.errors import DataError, InfraError, NumericError
from openrlhf.rollout.types import Rollout, SamplingParams
from openrlhf.trainer.ppo.groups import LocalGroup, deal
from openrlhf.trainer.ppo.shards import shard
from tests.helpers import tiny_tokenizer
from tests.trainer.ppo.harness import (
    local_loop,
    reward_file,
    rollout_of,
    tiny_ppo_config,
    tiny_prompts,
    tiny_reward_model,
    with_algorithm,
    with_batch,
    with_rollout,
)

EOS = 2
CONSTANT = "def reward_func(queries, prompts):\n    return [{values}][:len(queries)]\n"


class ThreeShards(LocalGroup):
    """A group that pretends to need its rollouts in three shards."""

    size = 3


def generated(loop, count: int = 4) -> list[Rollout]:
    rollout = loop.config.rollout
    sampling = SamplingParams(rollout.generate_max_len, rollout.temperature, n=rollout.n_samples_per_prompt)
    return loop.collector.engine.generate(loop.prompts[:count], sampling)


def test_scores_are_clipped_before_the_group_baseline(tmp_path):
    source = CONSTANT.format(values="100.0, 0.0, 1.0, 3.0")
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="rloo", init_kl_coef=0.0)
    reward = RewardConfig(remote_rm_url=reward_file(tmp_path, source), reward_clip_range=(-5.0, 5.0))
    loop, _ = local_loop(with_rollout(replace(config, reward=reward), n_samples_per_prompt=2))
    made = loop.maker.make(generated(loop, count=2))
    (experience,) = made.shards
    last = [float(experience.returns[row][experience.action_mask[row]][-1]) for row in range(4)]
    # Clipped after the baseline, the first pair would be 5 and -5 only by chance of its range: 100 - 0 clips to 5.
    assert last == pytest.approx([5.0, -5.0, -2.0, 2.0])
    assert made.scores == [100.0, 0.0, 1.0, 3.0]
    assert made.metrics["reward"] == pytest.approx(26.0)


def test_a_clip_that_bites_one_sample_moves_the_baseline_of_the_others(tmp_path):
    source = CONSTANT.format(values="100.0, 0.0, 0.0")
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="rloo", init_kl_coef=0.0)
    reward = RewardConfig(remote_rm_url=reward_file(tmp_path, source), reward_clip_range=(-1.0, 1.0))
    loop, _ = local_loop(with_rollout(replace(config, reward=reward), n_samples_per_prompt=3))
    (experience,) = loop.maker.make(generated(loop, count=1)).shards
    last = [float(experience.returns[row][experience.action_mask[row]][-1]) for row in range(3)]
    assert last == pytest.approx([1.0, -0.5, -0.5])


def test_rewards_of_models_and_of_a_function_are_added(tmp_path):
    config = tiny_ppo_config(tmp_path)
    model = PPOModelConfig(
        pretrain=config.model.pretrain,
        reward_pretrain=f"{tiny_reward_model(tmp_path / 'rm')},{tiny_reward_model(tmp_path / 'rm2')}",
    )
    reward = RewardConfig(remote_rm_url=reward_file(tmp_path, CONSTANT.format(values="1.0, 2.0, 3.0, 4.0")))
    loop, _ = local_loop(replace(config, model=model, reward=reward))
    rollouts = generated(loop)
    worker = loop.roles.rewards[0].worker
    single = worker.score(shard(rollouts, 1, 0))[0].tolist()
    rated, true_scores = loop.maker.rater.score(rollouts)
    assert rated.scores.tolist() == pytest.approx(
        [2 * value + number for number, value in enumerate(single, start=1)], abs=1e-5
    )
    assert true_scores is None
    loop.maker.rater.config = replace(loop.config, reward=replace(reward, reward_weights="1,-3,1"))
    weighted = [-2 * value + number for number, value in enumerate(single, start=1)]
    assert loop.maker.rater.rate(rollouts).scores.tolist() == pytest.approx(weighted, abs=1e-5)


def test_shards_of_like_many_tokens_give_every_answer_its_own_reward(tmp_path):
    config = tiny_ppo_config(tmp_path)
    model = PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=tiny_reward_model(tmp_path / "rm"))
    reward = RewardConfig(remote_rm_url=reward_file(tmp_path, CONSTANT.format(values="1.0, 2.0, 3.0, 4.0, 5.0, 6.0")))
    config = replace(with_algorithm(config, init_kl_coef=0.0), model=model, reward=reward)
    loop, _ = local_loop(config)
    rollouts = generated(loop, count=6)
    expected = loop.maker.rater.rate(rollouts).scores.tolist()
    cut, _ = local_loop(with_batch(config, use_dynamic_batch=True, train_max_tokens_per_gpu=30))
    cut.maker.roles = cut.maker.rater.roles = replace(cut.roles, policy=ThreeShards(cut.roles.policy.worker))
    made = cut.maker.make(rollouts)
    assert made.scores == pytest.approx(expected, abs=1e-5)
    assert len(made.shards) == 3 and sorted(len(part) for part in made.shards) == [2, 2, 2]
    for part in made.shards:
        for row, sample in enumerate(part.sample.tolist()):
            ids = part.sequences[row, part.attention_mask[row]].tolist()
            assert ids == list(rollouts[sample].token_ids)
            assert float(part.scores[row]) == pytest.approx(expected[sample], abs=1e-5)
            assert float(part.returns[row][part.action_mask[row]][-1]) == pytest.approx(expected[sample], abs=1e-5)


def test_shards_by_tokens_are_as_even_as_whole_answers_allow(tmp_path):
    (prompt,) = tiny_prompts(tiny_tokenizer(tmp_path), 1)
    rollouts = [rollout_of(prompt, [5] * length) for length in (90, 80, 10, 20, 5, 15, 5, 3)]
    sums = [int(part.attention_mask.sum()) for part in shard(rollouts, 2, 0, by_tokens=True)]
    assert abs(sums[0] - sums[1]) <= 8
    plain = [int(part.attention_mask.sum()) for part in shard(rollouts, 2, 0)]
    assert abs(plain[0] - plain[1]) > 100


def test_the_reward_function_sees_query_prompt_and_label(tmp_path):
    source = (
        "def reward_func(queries, prompts, labels):\n"
        "    assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts))\n"
        "    return [float(label) for label in labels]\n"
    )
    config = replace(tiny_ppo_config(tmp_path), reward=RewardConfig(remote_rm_url=reward_file(tmp_path, source)))
    loop, _ = local_loop(with_rollout(config, n_samples_per_prompt=2))
    assert loop.maker.rater.score(generated(loop, count=3))[0].scores.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_reward_that_is_not_finite_names_its_prompt(tmp_path):
    model = tiny_reward_model(tmp_path / "rm", mean=0.0, std=0.0)
    config = tiny_ppo_config(tmp_path)
    models = PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=model)
    loop, _ = local_loop(replace(config, model=models, reward=RewardConfig(normalize_reward=True)))
    with pytest.raises(NumericError, match="4 answers.*prompts 0, 1, 2, 3 "):
        loop.maker.make(generated(loop))


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_reward_function_that_gives_no_number_names_its_prompt(tmp_path, value):
    source = CONSTANT.format(values=f"1.0, 2.0, {value}, 4.0")
    config = replace(tiny_ppo_config(tmp_path), reward=RewardConfig(remote_rm_url=reward_file(tmp_path, source)))
    loop, _ = local_loop(config)
    with pytest.raises(NumericError, match=r"not finite.*2: (nan|inf)"):
        loop.maker.make(generated(loop))


def spoil(model: torch.nn.Module, value: float) -> None:
    """Put ``value`` into the embedding of the end token; a language model's head is tied to it."""
    with torch.no_grad():
        model.get_input_embeddings().weight[EOS] = value


@pytest.mark.parametrize(
    ("role", "value", "what", "samples"),
    [
        ("policy", float("nan"), "log_probs and kl", (0, 1, 2, 3)),
        ("policy", float("inf"), "log_probs and kl", (0, 1, 2, 3)),
        ("reference", float("nan"), "kl and advantages", (0, 1, 2, 3)),
        # The prompt of 2 begins like that of 1, with which it is computed.
        ("critic", float("nan"), "advantages and returns", (1, 2, 3)),
        ("critic", float("inf"), "advantages and returns", (1, 2, 3)),
    ],
)
def test_a_model_that_gives_no_number_stops_the_rollout_and_names_the_prompts(tmp_path, role, value, what, samples):
    loop, _ = local_loop(with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae"))
    answers = [[11, 12], [11, EOS, 12], [13], [14, EOS, 15, 16]]
    rollouts = [rollout_of(prompt, answer) for prompt, answer in zip(loop.prompts, answers, strict=False)]
    worker = getattr(loop.roles, role).worker
    module = worker.model if role == "reference" else worker.engine.module
    spoil(module.model, value)
    with pytest.raises(NumericError, match=what) as caught:
        loop.maker.make(rollouts)
    assert f"prompts {', '.join(map(str, samples))} " in str(caught.value)
    assert caught.value.rows == samples


def test_a_rollout_without_a_single_token_is_an_error(tmp_path):
    loop, _ = local_loop(tiny_ppo_config(tmp_path))
    with pytest.raises(DataError, match="no answer of this rollout has a token.*prompts 0, 1"):
        loop.maker.make([rollout_of(prompt, []) for prompt in loop.prompts[:2]])


def test_groups_whose_answers_have_one_reward_are_counted_and_teach_nothing(tmp_path):
    source = CONSTANT.format(values="1.0, 1.0, 0.0, 3.0, 50.0, 60.0, 2.0, 2.0")
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="rloo", init_kl_coef=0.0)
    config = replace(config, reward=RewardConfig(remote_rm_url=reward_file(tmp_path, source)))
    loop, _ = local_loop(with_rollout(config, n_samples_per_prompt=2))
    made = loop.maker.make(generated(loop, count=4))
    # 50 and 60 are both clipped to 10.
    assert made.metrics["zero_variance_groups"] == 0.75
    (experience,) = made.shards
    flat = experience.advantages.abs().amax(dim=1) == 0
    assert flat.tolist() == [True, True, False, False, True, True, True, True]


def test_the_critic_is_measured_by_the_variance_that_it_explains(tmp_path):
    loop, _ = local_loop(with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae", lambd=0.95))
    made = loop.maker.make(generated(loop, count=8))
    (one,) = made.shards
    mask = one.action_mask
    expected = 1 - (one.returns - one.values)[mask].var() / one.returns[mask].var()
    assert made.metrics["explained_variance"] == pytest.approx(float(expected), abs=1e-4)
    assert "zero_variance_groups" not in made.metrics


def test_metrics_describe_the_rollouts(tmp_path):
    loop, _ = local_loop(tiny_ppo_config(tmp_path))
    short, long = loop.prompts[0], loop.prompts[2]
    rollouts = [rollout_of(short, [11, EOS]), rollout_of(long, [11, 12, 13, 14], finish_reason="length")]
    exact = loop.roles.policy.worker.log_probs(shard(rollouts, 1, 0))[0]
    mask = shard(rollouts, 1, 0)[0].action_mask
    rollouts = [
        replace(rollout, log_probs=tuple(row[keep].tolist()))
        for rollout, row, keep in zip(rollouts, exact, mask, strict=True)
    ]
    metrics = loop.maker.make(rollouts).metrics
    assert metrics["response_length"] == 3.0
    assert metrics["truncated_rate"] == 0.5
    assert metrics["total_length"] == (len(short.token_ids) + len(long.token_ids) + 6) / 2
    assert metrics["entropy"] == pytest.approx(-float(exact[mask].mean()), rel=1e-5)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["sync_gap"] == pytest.approx(0.0, abs=1e-6)


def test_an_engine_that_serves_other_weights_stops_the_run(tmp_path):
    loop, _ = local_loop(tiny_ppo_config(tmp_path))
    rollouts = [replace(rollout, log_probs=tuple(p - 0.5 for p in rollout.log_probs)) for rollout in generated(loop)]
    with pytest.raises(InfraError, match="tied embeddings.*dtype.*stale"):
        loop.maker.make(rollouts)
    loop.maker.config = replace(loop.config, vllm=VLLMConfig(sync_tolerance=0.6))
    assert loop.maker.make(rollouts).metrics["sync_gap"] == pytest.approx(0.5, abs=1e-4)


def test_log_probs_that_are_not_numbers_stop_the_run(tmp_path):
    loop, _ = local_loop(tiny_ppo_config(tmp_path))
    rollouts = [replace(rollout, log_probs=(float("nan"),) * rollout.num_actions) for rollout in generated(loop)]
    with pytest.raises(InfraError, match="nan"):
        loop.maker.make(rollouts)


def test_experiences_do_not_depend_on_the_number_of_shards(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae")
    loop, _ = local_loop(config)
    rollouts = generated(loop, count=7)
    one = loop.maker.make(rollouts)
    loop.maker.roles = loop.maker.rater.roles = replace(loop.roles, reference=ThreeShards(loop.roles.reference.worker))
    three = loop.maker.make(rollouts)
    assert [len(part) for part in three.shards] == [2, 2, 3]
    assert three.metrics == pytest.approx(one.metrics, abs=1e-5)
    assert three.whiten == pytest.approx(one.whiten, rel=1e-5)
    rows = torch.cat([part.advantages[part.action_mask] for part in three.shards])
    torch.testing.assert_close(rows, one.shards[0].advantages[one.shards[0].action_mask], atol=1e-5, rtol=1e-5)


def test_fewer_rollouts_than_shards_leave_some_empty(tmp_path):
    loop, _ = local_loop(tiny_ppo_config(tmp_path))
    loop.maker.roles = loop.maker.rater.roles = replace(loop.roles, reference=ThreeShards(loop.roles.reference.worker))
    made = loop.maker.make(generated(loop, count=2))
    assert sorted(len(part) for part in made.shards) == [0, 1, 1]
    assert loop.update(made)["policy_loss"] == pytest.approx(0.0, abs=1.0)


def test_a_reward_model_may_get_a_shard_without_answers(tmp_path):
    config = tiny_ppo_config(tmp_path)
    model = PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=tiny_reward_model(tmp_path / "rm"))
    loop, _ = local_loop(replace(config, model=model, reward=RewardConfig()))
    rollouts = generated(loop, count=2)
    scores = loop.maker.rater.rate(rollouts).scores.tolist()
    loop.maker.roles = loop.maker.rater.roles = replace(loop.roles, policy=ThreeShards(loop.roles.policy.worker))
    assert loop.maker.make(rollouts).scores == pytest.approx(scores, abs=1e-5)


def test_without_a_kl_penalty_there_is_no_reference(tmp_path):
    loop, _ = local_loop(with_algorithm(tiny_ppo_config(tmp_path), init_kl_coef=0.0))
    assert loop.roles.reference is None
    assert loop.maker.make(generated(loop)).metrics["kl"] == 0.0


def test_dealing_keeps_order_and_balance():
    assert deal(range(7), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert deal([], 2) == [[], []]


def test_prompts_of_different_length_are_made_for_the_tests(tmp_path):
    loop, _ = local_loop(tiny_ppo_config(tmp_path))
    assert len({len(prompt.token_ids) for prompt in tiny_prompts(loop.maker.rater.tokenizer, 6)}) > 1


def test_penalties_for_length_come_after_the_clip_and_before_the_baseline(tmp_path):
    source = CONSTANT.format(values="100.0, 4.0, 4.0, 4.0")
    penalties = {"overlong_buffer_len": 4.0, "overlong_penalty_factor": 2.0, "stop_properly_penalty_coef": 0.5}
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="reinforce_baseline", init_kl_coef=0.0)
    reward = RewardConfig(remote_rm_url=reward_file(tmp_path, source), reward_clip_range=(-8.0, 8.0), **penalties)
    config = with_rollout(replace(config, reward=reward), n_samples_per_prompt=2, generate_max_len=6)
    loop, _ = local_loop(replace(config, vllm=VLLMConfig(sync_tolerance=1e3)))
    answers = [[11] * 6, [11] * 2, [11] * 4, [11] * 6]
    rollouts = [
        rollout_of(loop.prompts[n // 2], answer, finish_reason="length" if n == 3 else "stop")
        for n, answer in enumerate(answers)
    ]
    made = loop.maker.make(rollouts)
    (experience,) = made.shards
    # 8 - 2 and 4; 4 - 1 and 4 * .5 - 2.
    expected = [1.0, -1.0, 1.5, -1.5]
    last = [float(row[keep][-1]) for row, keep in zip(experience.returns, experience.action_mask, strict=True)]
    assert last == pytest.approx(expected)
    assert made.metrics["length_penalty"] == pytest.approx((2 + 0 + 1 + 4) / 4)
    assert made.metrics["reward"] == 28.0


def test_remax_subtracts_the_reward_of_the_greedy_answer_to_the_same_prompt(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="remax", init_kl_coef=0.0)
    loop, _ = local_loop(with_rollout(config, n_samples_per_prompt=2))
    rollouts, greedy = loop.collector.generate(list(loop.prompts[:3]), 0)
    assert [rollout.prompt.uid for rollout in greedy] == ["0", "1", "2"]
    again = loop.collector.engine.generate(list(loop.prompts[:3]), SamplingParams(6, temperature=0.0, seed=7))
    assert [rollout.token_ids for rollout in greedy] == [rollout.token_ids for rollout in again]
    made = loop.maker.make(rollouts, greedy)
    baseline = loop.maker.rater.score(greedy)[0].scores.tolist()
    (experience,) = made.shards
    for row, keep in enumerate(experience.action_mask):
        assert float(experience.returns[row][keep][-1]) == pytest.approx(made.scores[row] - baseline[row // 2])
    assert made.whiten is None


def test_advantages_may_be_centred_without_the_division(tmp_path):
    loop, _ = local_loop(with_algorithm(tiny_ppo_config(tmp_path), no_advantage_std_norm=True))
    made = loop.maker.make(generated(loop, count=8))
    assert made.whiten == (made.metrics["advantage_mean"], 1.0)
    assert made.metrics["advantage_std"] != 1.0


def test_a_divergence_in_the_loss_is_not_in_the_rewards(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), use_kl_loss=True, kl_estimator="k2", init_kl_coef=0.5)
    loop, _ = local_loop(config)
    loop.fit()
    made = loop.maker.make(generated(loop))
    assert made.kl > 0 and made.kl_coef == 0.5
    assert made.metrics["return"] == pytest.approx(made.metrics["reward"])


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_samples_of_an_engine_that_is_off_are_weighed(tmp_path, loss):
    correction = {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": (1.5,)}
    config = with_algorithm(tiny_ppo_config(tmp_path), policy_loss_type=loss, **correction)
    loop, _ = local_loop(replace(config, vllm=VLLMConfig(sync_tolerance=1.0)))
    rollouts = [replace(rollout, log_probs=tuple(p - 0.5 for p in rollout.log_probs)) for rollout in generated(loop)]
    metrics = loop.update(loop.maker.make(rollouts))
    assert metrics["vllm_kl"] == pytest.approx(-0.5, abs=1e-4)
    if loss == "ppo":
        # exp(.5) is 1.65, cut to 1.5.
        assert metrics["is_weight"] == pytest.approx(1.5, abs=1e-4)
        assert metrics["is_outside"] == 1.0
    else:
        # The one ratio of a sequence is against the engine: k3 of exp(.5).
        assert metrics["approx_kl"] == pytest.approx(math.expm1(0.5) - 0.5, abs=1e-4)
        assert "is_weight" not in metrics
