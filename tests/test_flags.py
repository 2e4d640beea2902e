"""Every command against the flags of OpenRLHF 0.5.9: names, types, defaults, choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf.config.algorithms import ESTIMATORS
from openrlhf.config.chat import ChatConfig
from openrlhf.config.combiner import CombinerConfig
from openrlhf.config.flags import flag_table
from openrlhf.config.help import print_help
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.serve import ServeConfig
from openrlhf.config.supervised import (
    DPOConfig,
    KDConfig,
    KTOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
)

SEED = json.loads((Path(__file__).parent / "data" / "flags.json").read_text(encoding="utf-8"))
COMMANDS = {
    "train_sft": SFTConfig,
    "train_rm": RewardModelConfig,
    "train_dpo": DPOConfig,
    "train_kto": KTOConfig,
    "train_kd": KDConfig,
    "train_prm": PRMConfig,
    "train_ppo": PPOConfig,
    "train_ppo_ray": RayPPOConfig,
    "lora_combiner": CombinerConfig,
    "serve_rm": ServeConfig,
    "batch_inference": BatchInferenceConfig,
    "interactive_chat": ChatConfig,
}
KINDS = {"int": int, "float": float, "str": str, None: bool}

# (flag, what, OpenRLHF's, ours): why
DEVIATIONS = {
    ("zero_stage", "choices", None, (0, 1, 2, 3)): "DeepSpeed knows these stages",
    ("grad_accum_dtype", "choices", None, ("fp32", "bf16", "fp16")): "DeepSpeed knows these types",
    ("vllm_sync_backend", "choices", None, ("nccl", "gloo")): "the two backends of OpenRLHF's help",
    ("advantage_estimator", "choices", ("gae", "reinforce", "rloo"), tuple(ESTIMATORS)): "later estimators too",
    ("host", "default", "0.0.0.0", "127.0.0.1"): "only this machine may ask a server without a key",
    ("max_len", "default", "2048", 2048): "a number, where OpenRLHF's default is its text",
    ("lr_scheduler", "choices", None, "schedules"): "OpenRLHF fails later on a name it cannot use",
}
EVERYWHERE = {
    *("trust_remote_code", "collective_timeout", "run_path", "eval_dataset", "max_skipped_steps"),
    *("too_long", "special_tokens_in_text", "show_samples", "allow_config_change", "use_ds_universal_ckpt"),
    *("profile_steps", "use_dynamic_batch", "train_max_tokens_per_gpu", "use_liger_kernel"),
}
HF_CKPT = {"save_hf_ckpt", "disable_ds_ckpt"}
PACKING = {"packing_samples", "ring_attn_size", "ring_head_stride"}
TEMPLATES = {"input_template", "apply_chat_template", "tokenizer_chat_template"}
PPO = EVERYWHERE | {
    *("tokenizer_chat_template", "label_key", "ema_beta"),
    *("eval_split", "eval_temperature", "eval_n_samples_per_prompt", "eval_reward_func", "best_metric_key"),
    *("rollout_max_tokens_per_gpu", "prm_pretrain", "prm_placeholder_token", "prm_reward_tokens"),
    *("kl_estimator", "use_kl_loss", "kl_horizon", "no_advantage_std_norm", "policy_loss_type", "loss_reduction"),
    *("eps_clip_low_high", "dual_clip", "entropy_loss_coef", "overlong_buffer_len", "overlong_penalty_factor"),
    *("stop_properly_penalty_coef", "enable_vllm_is_correction", "vllm_is_correction_type"),
    *("remote_rm_mode", "remote_rm_timeout", "remote_rm_tries", "remote_rm_key", "reward_weights"),
    *("reward_func_timeout", "reward_func_env"),
    *("vllm_is_truncated_threshold", "dynamic_filtering", "dynamic_filtering_reward_range"),
}
EXTRA = {
    "train_sft": EVERYWHERE,
    "lora_combiner": {"trust_remote_code"},
    "serve_rm": {"trust_remote_code", "api_key"},
    "interactive_chat": {"trust_remote_code", "tokenizer_chat_template", "seed"},
    "batch_inference": {
        *("trust_remote_code", "collective_timeout", "too_long", "special_tokens_in_text", "window_size"),
        "tokenizer_chat_template",
    },
    "train_rm": EVERYWHERE | {"lr_scheduler", *HF_CKPT},
    "train_dpo": EVERYWHERE
    | {"lr_scheduler", "tokenizer_chat_template", "loss", "target_margin", "precompute_ref_log_probs"},
    "train_kto": EVERYWHERE
    | HF_CKPT
    | PACKING
    | {"lr_scheduler", "tokenizer_chat_template", "precompute_ref_log_probs"},
    "train_kd": EVERYWHERE | HF_CKPT | PACKING | {"tokenizer_chat_template", "multiturn"},
    "train_prm": EVERYWHERE | HF_CKPT | TEMPLATES | (PACKING - {"packing_samples"}) | {"use_tensorboard", "steps_key"},
    "train_ppo": PPO | PACKING | {"ref_reward_offload"},
    "train_ppo_ray": PPO | (PACKING - {"packing_samples"}) | {"sync_tolerance", "deepspeed_enable_sleep"},
}
ROWS = [(command, row) for command in COMMANDS for row in SEED[command]]
IDS = [f"{command}{row['flag']}" for command, row in ROWS]


def ours(command, row):
    return flag_table(COMMANDS[command])[row["flag"].removeprefix("--")]


def plain(value):
    """One way to write a default: a tuple of one is its value, lists are tuples."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values[0] if len(values) == 1 else values


@pytest.mark.parametrize(("command", "row"), ROWS, ids=IDS)
def test_a_flag_has_the_type_of_openrlhf(command, row):
    flag = ours(command, row)
    assert flag.kind is KINDS[row["type"]]
    assert flag.count == {None: 0 if row["action"] else 1, 2: 2, "*": -1}[row.get("nargs")]


@pytest.mark.parametrize(("command", "row"), ROWS, ids=IDS)
def test_a_flag_has_the_default_of_openrlhf(command, row):
    default = ours(command, row).default
    if plain(default) != plain(row["default"]):
        assert (row["flag"][2:], "default", row["default"], default) in DEVIATIONS
    assert ours(command, row).optional == (row["default"] is None or row["flag"] == "--input_template")
    if row["type"] == "int" and default is not None:
        assert isinstance(default, int)


@pytest.mark.parametrize(("command", "row"), ROWS, ids=IDS)
def test_a_flag_takes_the_values_of_openrlhf(command, row):
    flag = ours(command, row)
    choices = flag.metadata["choices"]
    if flag.name == "lr_scheduler":
        choices = "schedules" if choices else None
    theirs = row["choices"] and tuple(row["choices"])
    if choices != theirs:
        assert (flag.name, "choices", theirs, choices) in DEVIATIONS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_beyond_openrlhf_are_listed(command):
    assert set(flag_table(COMMANDS[command])) - {row["flag"][2:] for row in SEED[command]} == EXTRA[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_sentence_of_help(command):
    for flag in flag_table(COMMANDS[command]).values():
        assert flag.metadata["help"].endswith("."), flag.name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_flag_once_and_no_negations(command, capsys):
    print_help(COMMANDS[command], command)
    words = capsys.readouterr().out.replace("│", " ").split()
    flags = flag_table(COMMANDS[command])
    for name in flags:
        assert f"--{name}" in words
    assert "--config" in words and "--dry_run" in words
    assert not [word for word in words if word.startswith(("--no-", "--no_")) and word[2:] not in flags]


def test_the_old_spelling_of_the_value_head_is_hidden(capsys):
    print_help(RewardModelConfig, "train_rm")
    assert "value_prefix_head" not in capsys.readouterr().out
