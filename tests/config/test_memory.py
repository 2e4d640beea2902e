"""The estimate of memory: its arithmetic by hand, and whether the models of well-known scripts fit their cards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from openrlhf.config.arguments import parse
from openrlhf.config.memory import Memory, Sharding, forward, frozen, key_values, trained
from openrlhf.config.needs import Pool, need_lines, phase_needs, ppo_roles, supervised_roles
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.shapes import shape_of
from openrlhf.config.supervised import DPOConfig
from openrlhf.ray.placement import Placement
from tests.helpers import tiny_causal_lm, tiny_config


def per_parameter(stage: int, ranks: int, **options) -> list[float]:
    kept = trained(100, 100, Sharding(stage, ranks, **options))
    return [kept.weights / 100, kept.gradients / 100, kept.optimizer / 100, kept.host / 100]


def test_every_stage_shares_what_it_shards():
    assert per_parameter(0, 4) == [4, 4, 8, 0]
    assert per_parameter(1, 4) == [4, 4, 3, 0]
    assert per_parameter(2, 4) == [4, 1, 3, 0]
    assert per_parameter(2, 4, bf16=True) == [2, 0.5, 3, 0]
    assert per_parameter(3, 4, bf16=True) == [0.5, 0.5, 3, 0]
    assert per_parameter(2, 4, bf16=True, offload=True) == [2, 0, 0, 4]


def test_what_is_not_trained_has_weights_alone():
    assert trained(110, 10, Sharding(four_bits=True, bf16=True)) == Memory(50 + 20, 20, 120)
    assert frozen(100, Sharding(2, 4, bf16=True, offload=True)) == Memory(weights=200)
    assert frozen(4_000_000_000, Sharding(3, 4, bf16=True, offload=True)) == Memory(host=2e9)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_folder_tells_how_many_parameters_its_model_has(tmp_path, arch):
    model = tiny_causal_lm(tmp_path, arch, hidden=128)
    counts = [weight.numel() for name, weight in model.named_parameters() if "wpe" not in name]
    assert shape_of(str(tmp_path)).parameters == pytest.approx(sum(counts), rel=0.02)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("OpenRLHF/Llama-3-8b-sft-mixture", 8.03),
        ("meta-llama/Meta-Llama-3-70B", 70.55),
        ("meta-llama/Llama-2-7b-hf", 6.74),
        ("codellama/CodeLlama-34b-hf", 33.74),
        ("01-ai/Yi-34B", 34.39),
        ("mistralai/Mixtral-8x7B-v0.1", 46.70),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),
        ("Qwen/Qwen2.5-7B", 7.62),
    ],
)
def test_a_well_known_name_tells_it_too(name, billions):
    assert shape_of(name).parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_name_without_a_size_and_a_broken_folder_tell_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert shape_of("somebody/something") is None and shape_of(str(tmp_path)) is None and shape_of(None) is None
    assert need_lines("somebody/something", [])[0].startswith("not known: somebody/something")


def test_the_cache_of_a_token_is_its_keys_and_values():
    assert key_values(shape_of("meta-llama/Meta-Llama-3-8B"), 1, 2) == 2 * 32 * 1024 * 2


EIGHT_B = ["--prompt_data", "p", "--bf16", "--gradient_checkpointing", "--zero_stage", "3", "--flash_attn"]
EIGHT_B += ["--micro_train_batch_size", "1", "--micro_rollout_batch_size", "4"]


def fits(config: RayPPOConfig) -> list[str]:
    """Return for every group of devices which cards have room for it."""
    lines = Placement.from_config(config).memory(config)
    return [line.split("; ")[1].split(",")[0] for line in lines if "; fits" in line]


def ranks(count: int) -> list[str]:
    return [
        word for role in ("actor", "critic", "ref", "reward") for word in (f"--{role}_num_gpus_per_node", str(count))
    ]


def test_70b_on_sixteen_80_gb_cards_fits():
    words = ["--pretrain", "meta-llama/Meta-Llama-3-70B", "--reward_pretrain", "meta-llama/Meta-Llama-3-70B"]
    words += [*EIGHT_B, *ranks(4), "--colocate_actor_ref", "--colocate_critic_reward", "--adam_offload"]
    engines = ["--vllm_num_engines", "4", "--vllm_tensor_parallel_size", "2"]
    config = parse(RayPPOConfig, [*words, *engines], "train_ppo_ray")[0]
    assert Placement.from_config(config).slots == 16
    assert fits(config) == ["fits cards of 80 GB and more"] * 3
    without = [word for word in words if word != "--adam_offload"]
    config = parse(RayPPOConfig, [*without, *engines], "train_ppo_ray")[0]
    assert fits(config)[0].startswith("fits no card")


def test_34b_dpo_on_eight_80_gb_cards_fits():
    words = ["--pretrain", "codellama/CodeLlama-34b-hf", "--dataset", "d", "--bf16", "--max_len", "2048"]
    words += ["--zero_stage", "3", "--micro_train_batch_size", "1", "--gradient_checkpointing", "--adam_offload"]
    roles = supervised_roles(parse(DPOConfig, words, "train_dpo")[0], 8)
    assert [role.name for role in roles] == ["model", "reference"]
    verdict = need_lines(roles, [Pool(("model", "reference"), at_once=False)])[-2]
    assert verdict.startswith("model, reference: ") and verdict.endswith("fits cards of 40 GB and more")


def test_7b_on_four_24_gb_cards_fits_asleep_and_with_everything_offloaded_only():
    words = ["--pretrain", "meta-llama/Llama-2-7b-hf", "--reward_pretrain", "meta-llama/Llama-2-7b-hf", *EIGHT_B]
    words += ["--adam_offload", "--vllm_num_engines", "4", "--colocate_all_models", *ranks(4)]
    words += ["--advantage_estimator", "reinforce", "--vllm_gpu_memory_utilization", "0.65"]
    asleep = ["--vllm_enable_sleep", "--ref_reward_offload"]
    assert fits(parse(RayPPOConfig, words, "train_ppo_ray")[0]) != ["fits cards of 24 GB and more"]
    assert fits(parse(RayPPOConfig, [*words, *asleep], "train_ppo_ray")[0]) == ["fits cards of 24 GB and more"]


def test_an_engine_that_sleeps_and_states_that_rest_leave_their_room_to_others():
    config = parse(RayPPOConfig, [*PPO_8B, *ranks(1)], "train_ppo_ray")[0]
    roles = ppo_roles(config, {"actor": 1}, 0.5)
    awake, asleep = (phase_needs(Pool(("actor", "vllm"), sleeps), roles, 80e9) for sleeps in (False, True))
    assert awake["train actor"] - asleep["train actor"] == pytest.approx(40e9)
    resting = phase_needs(Pool(("actor", "vllm"), True, True), roles, 80e9)
    assert asleep["generate"] - resting["generate"] == roles[0].held.optimizer
    assert asleep["train actor"] == resting["train actor"]


PPO_8B = ["--pretrain", "meta-llama/Meta-Llama-3-8B", "--reward_pretrain", "r", "--prompt_data", "p", "--bf16"]
PPO_8B += ["--vllm_num_engines", "1", "--zero_stage", "2"]


def scored(*words: str) -> float:
    """Return the bytes of a forward of the reference that scores."""
    config = parse(RayPPOConfig, [*PPO_8B, "--micro_rollout_batch_size", "4", *words], "train_ppo_ray")[0]
    return (
        next(role for role in ppo_roles(config, {"actor": 2, "ref": 2}) if role.name == "ref").phases["score"].working
    )


def test_a_forward_that_scores_has_the_tokens_of_its_budget_and_of_its_part_of_a_ring():
    longest = 2048
    one, shape = scored("--micro_rollout_batch_size", "1"), shape_of("meta-llama/Meta-Llama-3-8B")
    assert one == forward(shape, longest, Sharding(2, 2, bf16=True)).working
    assert scored("--dry_run", "--ring_attn_size", "2") == scored("--micro_rollout_batch_size", "2")
    budget = ["--use_dynamic_batch", "--train_max_tokens_per_gpu"]
    assert scored(*budget, str(3 * longest)) == scored("--micro_rollout_batch_size", "3")
    assert scored(*budget, str(3 * longest), "--rollout_max_tokens_per_gpu", str(5 * longest)) == scored(
        "--micro_rollout_batch_size", "5"
    )
    assert scored(*budget, "7") == one, "a row is never cut"


def need(*words: str) -> str:
    """Return the line of the estimate about devices that all models of a run share."""
    reward = ["--reward_pretrain", "meta-llama/Meta-Llama-3-8B", "--colocate_all_models", *ranks(1)]
    config = parse(RayPPOConfig, [*PPO_8B, *reward, *words], "train_ppo_ray")[0]
    return next(line for line in Placement.from_config(config).memory(config) if "GiB a device" in line)


@pytest.mark.parametrize(
    ("words", "rests"), [("--zero_stage 2", True), ("--zero_stage 0", False), ("--adam_offload", False)]
)
def test_states_that_were_never_moved_leave_no_room(words, rests):
    assert (need(*words.split(), "--deepspeed_enable_sleep") != need(*words.split())) == rests


def test_the_estimate_imports_neither_torch_nor_transformers():
    code = (
        "import sys, openrlhf.config.needs; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_config_of_transformers_is_read_by_its_names():
    shape = tiny_config("gpt2", hidden=64)
    assert shape.n_embd == 64
