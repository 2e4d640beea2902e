"""What a resumed run may change: places and cadences, not what it learns."""

from dataclasses import replace

import pytest

from openrlhf.config.continuing import FREE_FLAGS, FREE_GROUPS, IN_THE_LAYOUT, changed_flags, longer, training_flags
from openrlhf.config.flags import flag_table
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.supervised import DPOConfig, KDConfig, KTOConfig, PRMConfig, RewardModelConfig, SFTConfig

COMMANDS = (SFTConfig, RewardModelConfig, DPOConfig, KTOConfig, KDConfig, PRMConfig, RayPPOConfig)


def with_flags(config, **values):
    """Return ``config`` with other values of flags, wherever they live."""
    for name, value in values.items():
        path = flag_table(type(config))[name].path
        if len(path) == 1:
            config = replace(config, **{name: value})
        else:
            config = replace(config, **{path[0]: replace(getattr(config, path[0]), **{name: value})})
    return config


def changes(config, **values):
    return changed_flags(training_flags(config), training_flags(with_flags(config, **values)))


@pytest.mark.parametrize(
    ("command", "name", "value", "said"),
    [
        (SFTConfig, "learning_rate", 1e-3, "--learning_rate 5e-06 -> 0.001"),
        (SFTConfig, "train_batch_size", 64, "--train_batch_size 128 -> 64"),
        (SFTConfig, "adam_betas", (0.9, 0.99), "--adam_betas 0.9 0.95 -> 0.9 0.99"),
        (SFTConfig, "seed", 1, "--seed 42 -> 1"),
        (SFTConfig, "ring_attn_size", 2, "--ring_attn_size 1 -> 2"),
        (SFTConfig, "max_epochs", 1, "--max_epochs 2 -> 1"),
        (SFTConfig, "lr_scheduler", "linear", "--lr_scheduler cosine_with_min_lr -> linear"),
        (RewardModelConfig, "loss", "logexp", "--loss sigmoid -> logexp"),
        (DPOConfig, "beta", 0.2, "--beta 0.1 -> 0.2"),
        (PRMConfig, "reward_tokens", ("+", "-"), "--reward_tokens None -> + -"),
        (RayPPOConfig, "init_kl_coef", 0.1, "--init_kl_coef 0.01 -> 0.1"),
        (RayPPOConfig, "eps_clip", 0.1, "--eps_clip 0.2 -> 0.1"),
        (RayPPOConfig, "advantage_estimator", "rloo", "--advantage_estimator gae -> rloo"),
        (RayPPOConfig, "max_epochs", 2, "--max_epochs 1 -> 2"),
        (RayPPOConfig, "n_samples_per_prompt", 2, "--n_samples_per_prompt 1 -> 2"),
    ],
)
def test_a_flag_that_changes_the_training_is_named_with_both_values(command, name, value, said):
    assert changes(command(), **{name: value}) == [said]


@pytest.mark.parametrize(
    ("command", "values"),
    [
        (SFTConfig, {"save_path": "x", "ckpt_path": "y", "run_path": "z", "dataset": "moved.jsonl"}),
        (SFTConfig, {"save_steps": 7, "eval_steps": 3, "logging_steps": 2, "wandb_run_name": "x"}),
        (SFTConfig, {"use_dynamic_batch": True, "train_max_tokens_per_gpu": 9, "ring_head_stride": 2}),
        (SFTConfig, {"micro_train_batch_size": 1, "gradient_checkpointing": True, "collective_timeout": 5}),
        (DPOConfig, {"ref_offload": True, "precompute_ref_log_probs": True}),
        (KDConfig, {"teacher_offload": True}),
        (RayPPOConfig, {"colocate_all_models": True, "vllm_num_engines": 2, "eval_dataset": "x", "perf": True}),
    ],
)
def test_places_cadences_and_placement_may_change(command, values):
    assert changes(command(), **values) == []


@pytest.mark.parametrize(("command", "name"), [(SFTConfig, "max_epochs"), (RayPPOConfig, "num_episodes")])
def test_a_run_may_be_made_longer_but_not_shorter_in_silence(command, name):
    short, long = (training_flags(with_flags(command(), **{name: count})) for count in (3, 4))
    assert changed_flags(short, long) == [] and longer(short, long) == f"--{name} 3 -> 4"
    assert changed_flags(long, short) == [f"--{name} 4 -> 3"] and longer(long, short) is None


def test_a_flag_that_the_other_version_did_not_know_is_no_change():
    assert changed_flags({"learning_rate": 1.0, "gone": 2}, {"learning_rate": 1.0, "new": 3}) == []


def test_every_free_flag_and_group_is_declared():
    tables = [flag_table(command) for command in COMMANDS]
    assert {name for table in tables for name in table} >= FREE_FLAGS | IN_THE_LAYOUT
    assert {entry.path[0] for table in tables for entry in table.values()} >= FREE_GROUPS
