"""The plan that --dry_run prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf.cli import train_ppo
from openrlhf.config.arguments import parse
from openrlhf.config.plan import plan_lines
from openrlhf.config.ppo import PPOConfig
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.supervised import SFTConfig
from openrlhf.ray.placement import Placement

SFT = ["--pretrain", "model", "--dataset", "rows.jsonl", "--output_key", "answer"]
SFT += ["--train_batch_size", "20", "--micro_train_batch_size", "4"]
PPO = ["--pretrain", "model", "--prompt_data", "rows.jsonl", "--reward_pretrain", "a,b", "--rollout_batch_size", "16"]


def plan(config_class, words, *arguments, **options):
    return "\n".join(plan_lines(parse(config_class, words, "prog")[0], *arguments, **options))


def test_changed_settings_come_first_and_the_rest_last():
    text = plan(SFTConfig, SFT, 1)
    marks = ["train_batch_size = 20", "plan:", "by default:", "seed=42"]
    assert sorted(marks, key=text.index) == marks


def test_a_step_is_cut_over_ranks_and_micro_batches():
    assert "20 samples = 2 ranks x 3 micro-batches of at most 4" in plan(SFTConfig, SFT, 2)


def test_a_ring_counts_as_one_and_a_budget_of_tokens_takes_the_place_of_rows():
    ring = [*SFT, "--dry_run", "--ring_attn_size", "2"]
    assert "4 ranks, ZeRO stage 2: an optimizer step is 20 samples = 2 rings of 2 ranks x 3 micro" in plan(
        SFTConfig, ring, 4
    )
    tokens = ["--use_dynamic_batch", "--train_max_tokens_per_gpu", "1000"]
    assert "20 samples = 2 ranks x micro-batches of at most 1,000 tokens" in plan(SFTConfig, [*SFT, *tokens], 2)
    assert "1 ring of 2 ranks x micro-batches of at most 2,000 tokens" in plan(SFTConfig, [*ring, *tokens], 2)


@pytest.fixture
def rows(tmp_path):
    """A file of 50 rows and a blank line."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a"}\n' * 50 + "\n")
    return str(path)


def test_the_plan_promises_no_checkpoints_where_none_are_written():
    words = [*SFT, "--save_steps", "5", "--disable_ds_ckpt"]
    assert "checkpoints: none" in plan(SFTConfig, words, 1)
    assert "checkpoints: every 5 steps" in plan(SFTConfig, [*words, "--save_hf_ckpt"], 1)


def test_steps_are_counted_in_a_local_file(rows):
    assert "50 rows: 3 steps an epoch, 6 steps in 2 epochs" in plan(SFTConfig, [*SFT, "--dataset", rows], 1)
    assert "30 rows: 2 steps an epoch" in plan(SFTConfig, [*SFT, "--dataset", rows, "--max_samples", "30"], 1)


def test_steps_of_other_sources_are_known_once_the_data_is_read(rows):
    listed = rows.replace("rows.jsonl", "list.jsonl")
    Path(listed).write_text('[{"input": "a"},\n{"input": "b"}]')
    for words in (
        ["--dataset", "hub/name"],
        ["--dataset", listed],
        ["--dataset", f"{rows},{rows}", "--dataset_probs", "0.5,0.5"],
    ):
        assert "steps: known once the data is read" in plan(SFTConfig, [*SFT, *words], 1)
    assert "steps: known once the data is read" in plan(RayPPOConfig, [*PPO, "--prompt_data", "hub/name"], 1)


def test_a_file_of_rows_that_is_not_there_is_named(rows):
    missing = rows.replace("rows.jsonl", "row.jsonl")
    for words in (["--dataset", missing], ["--dataset", f"{rows},{missing}", "--dataset_probs", "0.5,0.5"]):
        assert f"steps: not known: {missing} is no file here" in plan(SFTConfig, [*SFT, *words], 1)
    assert f"{missing} is no file here" in plan(RayPPOConfig, [*PPO, "--prompt_data", missing], 1)


def test_a_rollout_step_says_answers_updates_and_rewards(rows):
    words = [*PPO, "--n_samples_per_prompt", "4", "--train_batch_size", "48", "--vllm_num_engines", "2"]
    text = plan(RayPPOConfig, [*words, "--prompt_data", rows, "--max_samples", "40"], 2)
    assert "16 prompts x 4 answers = 64 answers of at most 1024 tokens, from 2 vLLM engines" in text
    assert "then 2 optimizer steps x 1 epoch\n  2 ranks" in text
    assert "gae, critic from a" in text and "reward: a + b" in text
    assert "40 prompts x 1 episode: 3 rollout steps, 5 optimizer steps" in text


def test_reward_models_and_a_reward_file_are_both_named(tmp_path):
    (tmp_path / "reward.py").write_text("")
    text = plan(RayPPOConfig, [*PPO, "--remote_rm_url", str(tmp_path / "reward.py")], 1)
    assert f"reward: a + b + {tmp_path / 'reward.py'}" in text


def test_rewards_of_steps_and_texts_are_planned_too():
    words = [*PPO[:4], "--prm_pretrain", "p", "--prm_placeholder_token", "x", "--prm_reward_tokens", "+", "-"]
    text = plan(RayPPOConfig, [*words, "--pretrain_data", "t", "--ptx_coef", "0.2"], 1)
    assert "reward: of steps alone\n  process reward: p at every x\n" in text
    assert "beside it: 128 texts of t in every optimizer step, times 0.2" in text
    assert "texts" not in plan(RayPPOConfig, PPO, 1)


def test_the_process_reward_model_is_one_of_the_models_of_a_run(tmp_path):
    words = [*PPO, "--prm_pretrain", "p", "--prm_placeholder_token", "x", "--prm_reward_tokens", "+", "-"]
    names = ("actor", "ref", "critic", "reward", "reward-2", "prm")
    assert parse(PPOConfig, words, "train_ppo")[0].role_names == names
    config = parse(RayPPOConfig, words, "train_ppo_ray")[0]
    assert config.role_names == tuple(role.name for role in Placement.from_config(config).roles) == names
    local = parse(PPOConfig, [*words, "--lora_rank", "4", "--advantage_estimator", "reinforce"], "train_ppo")[0]
    assert "on each: actor, reward, reward-2, prm\n" in "\n".join([*train_ppo.plan(local, 1), ""])


def test_an_estimator_without_a_critic_says_so():
    assert "reinforce, no critic" in plan(RayPPOConfig, [*PPO, "--advantage_estimator", "reinforce"], 1)


def test_placement_lines_are_shown_as_given():
    assert "devices:\n  slot 0: actor, ref" in plan(RayPPOConfig, PPO, 1, placement=["slot 0: actor, ref"])


def test_the_plan_never_shows_an_api_key():
    assert "0123456789" not in plan(SFTConfig, [*SFT, "--use_wandb", "0123456789"], 1)
