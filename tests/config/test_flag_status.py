"""Flags that are not built yet, and flags that do nothing on this machine."""

from __future__ import annotations

from itertools import product

import pytest

from openrlhf.config.algorithms import PAIR_LOSSES
from openrlhf.config.arguments import parse, to_flat_dict
from openrlhf.config.flag_status import NO_EFFECT_HERE, missing_packages, no_effect_notices, status
from openrlhf.config.flags import flag_table
from openrlhf.config.groups import DeepSpeedConfig
from openrlhf.config.help import print_help
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.config.ppo import RolloutConfig
from openrlhf.config.ppo_ray import PlacementConfig, RayPPOConfig
from openrlhf.config.supervised import DPOConfig, KDConfig, KTOConfig, PRMConfig, RewardModelConfig, SFTConfig
from openrlhf.errors import UsageError
from openrlhf.strategy.deepspeed_config import train_config

SFT = ["--pretrain", "model", "--dataset", "rows.jsonl", "--output_key", "answer"]
PPO = ["--pretrain", "model", "--prompt_data", "rows.jsonl", "--reward_pretrain", "rm"]

COMMANDS = (
    *(SFTConfig, RewardModelConfig, DPOConfig, KTOConfig, KDConfig, PRMConfig),
    RayPPOConfig,
    BatchInferenceConfig,
)


def test_every_listed_flag_exists():
    known = {name for command in COMMANDS for name in flag_table(command)}
    assert set(NO_EFFECT_HERE) <= known


def test_a_dry_run_passes_for_modelscope_because_it_touches_no_hub():
    assert parse(SFTConfig, [*SFT, "--use_ms", "--dry_run"], "train_sft")[1]


def test_the_default_of_a_flag_that_does_nothing_may_be_written():
    words = ["--ring_attn_size", "1", "--lora_alpha", "32"]
    assert parse(SFTConfig, [*SFT, *words], "train_sft")[0].lora.lora_alpha == 32


def test_with_rewards_from_elsewhere_the_critic_starts_from_the_policy(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("", encoding="utf-8")
    config = parse(RayPPOConfig, [*PPO, "--remote_rm_url", str(path)], "train_ppo_ray")[0]
    assert config.critic_source == "model"


@pytest.mark.parametrize("config_class", COMMANDS)
def test_help_shows_the_status_of_a_flag(config_class, capsys):
    print_help(config_class, config_class.__name__)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    flags = flag_table(config_class)
    for name in set(NO_EFFECT_HERE) & set(flags):
        assert status(name) in text, name


def test_a_flag_without_a_note_simply_works():
    assert status("learning_rate") == ""


@pytest.mark.parametrize(("ranks", "fits"), [("1", False), ("2", True), ("3", False), ("4", True)])
def test_ranks_that_cannot_be_dealt_to_rings_are_refused_but_not_by_a_dry_run(ranks, fits, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    words = [*SFT, "--ring_attn_size", "2"]
    assert parse(SFTConfig, [*words, "--dry_run"], "train_sft")[1]
    if fits:
        assert parse(SFTConfig, words, "train_sft")[0].attention.ring_attn_size == 2
    else:
        with pytest.raises(UsageError, match=f"--ring_attn_size 2: {ranks} ranks? cannot be dealt to rings of 2"):
            parse(SFTConfig, words, "train_sft")


@pytest.mark.parametrize(("words", "gpu", "needed"), [("--bf16", True, 1), ("", True, 0), ("--bf16", False, 0)])
def test_a_ring_needs_its_package_for_half_precision_on_a_gpu(words, gpu, needed, monkeypatch):
    absent = "ring_flash_attn"
    monkeypatch.setattr("openrlhf.config.flag_status.find_spec", lambda name: None if name == absent else object())
    monkeypatch.setattr("openrlhf.config.flag_status.gpu_present", lambda: gpu)
    values = {name: entry.default for name, entry in flag_table(SFTConfig).items()}
    found = missing_packages(values | {"ring_attn_size": 2, "bf16": bool(words)})
    assert len(found) == needed and all("pip install 'openrlhf[ring]'" in problem for problem in found)


@pytest.mark.parametrize("gpu", [True, False])
def test_liger_kernels_need_their_package_and_a_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr("openrlhf.config.arguments.gpu_present", lambda: gpu)
    monkeypatch.setattr("openrlhf.config.flag_status.gpu_present", lambda: gpu)
    monkeypatch.setattr(
        "openrlhf.config.flag_status.find_spec", lambda name: None if name == "liger_kernel" else object()
    )
    words = ["--pretrain", "m", "--dataset", "d", "--use_liger_kernel"]
    if gpu:
        with pytest.raises(UsageError, match=r"pip install 'openrlhf\[liger\]'"):
            parse(SFTConfig, words, "train_sft")
    else:
        parse(SFTConfig, words, "train_sft")
        assert "--use_liger_kernel has no effect here: Liger's kernels are for GPUs" in capsys.readouterr().err


def test_one_line_for_each_flag_without_effect(monkeypatch, capsys):
    monkeypatch.setattr("openrlhf.config.arguments.gpu_present", lambda: False)
    parse(RayPPOConfig, [*PPO, "--vllm_enable_sleep", "--perf", "--overlap_comm"], "train_ppo_ray")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--perf", "--vllm_enable_sleep"]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_backend_is_told_only_when_it_was_asked_for(gpu):
    values = {"vllm_sync_backend": "nccl"}
    assert no_effect_notices(values, set(), gpu) == []
    assert "Ray's object store" in no_effect_notices(values, {"vllm_sync_backend"}, gpu)[0]


def test_offloading_the_reference_needs_a_gpu_and_stage_three():
    for stage, gpu, told in [(3, True, 0), (2, True, 1), (3, False, 1)]:
        values = {"zero_stage": stage, "ref_reward_offload": True}
        assert len(no_effect_notices(values, {"ref_reward_offload"}, gpu)) == told


@pytest.mark.parametrize(
    ("words", "feature"),
    [
        (["--lora_alpha", "32"], "--lora_rank"),
        (["--lora_dropout", "0.1"], "--lora_rank"),
        (["--target_modules", "q_proj"], "--lora_rank"),
        (["--ptx_coef", "0.1"], "--pretrain_data"),
        (["--pretrain_data_probs", "0.5"], "--pretrain_data"),
        (["--pretrain_split", "test"], "--pretrain_data"),
    ],
)
def test_a_flag_of_a_feature_that_is_off_is_told(words, feature, capsys):
    parse(RayPPOConfig, [*PPO, *words], "train_ppo_ray")
    assert capsys.readouterr().err == f"note: {words[0]} has no effect here: it needs {feature}\n"


NO_USE = [
    ("train_sft", "--tokenizer_chat_template x"),
    ("train_sft", "--apply_chat_template --input_template {}"),
    ("train_sft", "--pretrain_mode --output_key answer"),
    ("train_sft", "--pretrain_mode --apply_chat_template"),
    ("train_sft", "--gradient_checkpointing_use_reentrant"),
    ("train_sft", "--wandb_project p"),
    ("train_sft", "--ring_head_stride 2"),
    ("train_sft", "--train_max_tokens_per_gpu 100"),
    ("train_sft", "--use_dynamic_batch --micro_train_batch_size 2"),
    ("train_sft", "--save_hf_ckpt"),
    ("train_sft", "--show_samples"),
    ("train_sft", "--zero_stage 1 --overlap_comm"),
    ("train_sft", "--zpg 2"),
    ("train_sft", "--disable_ds_ckpt --save_steps 5"),
    ("train_rm", "--loss logexp --margin_loss"),
    ("train_dpo", "--target_margin 1"),
    ("train_dpo", "--loss simpo --beta 2 --ref_pretrain r"),
    ("train_dpo", "--loss orpo --precompute_ref_log_probs"),
    ("train_ppo_ray", "--advantage_estimator reinforce --critic_pretrain c"),
    ("train_ppo_ray", "--advantage_estimator reinforce --lambd 0.9"),
    ("train_ppo_ray", "--enforce_eager"),
    ("train_ppo_ray", "--advantage_estimator rloo --n_samples_per_prompt 2 --gamma 0.9"),
    ("train_ppo_ray", "--advantage_estimator remax --gamma 0.9"),
    ("train_ppo_ray", "--advantage_estimator group_norm --n_samples_per_prompt 2 --no_advantage_std_norm"),
    ("train_ppo_ray", "--advantage_estimator reinforce --policy_loss_type gspo --loss_reduction token"),
    ("train_ppo_ray", "--policy_loss_type cispo --dual_clip 3"),
    ("train_ppo_ray", "--eps_clip_low_high 0.2 0.3 --eps_clip 0.1"),
    ("train_ppo_ray", "--kl_horizon 500"),
    ("train_ppo_ray", "--dynamic_filtering_reward_range 0 2"),
    ("train_ppo_ray", "--best_metric_key eval_default_pass1"),
    ("train_ppo_ray", "--use_kl_estimator_k3 --kl_estimator k1"),
    ("train_ppo_ray", "--overlong_penalty_factor 2"),
    ("train_ppo_ray", "--vllm_is_correction_type icepop"),
    ("train_ppo_ray", "--vllm_is_truncated_threshold 2"),
    ("train_ppo_ray", "--enable_vllm_is_correction --policy_loss_type gspo --vllm_is_correction_type icepop"),
    ("train_ppo_ray", "--enable_vllm_is_correction --policy_loss_type gspo --vllm_is_truncated_threshold 2"),
    ("train_ppo_ray", "--advantage_estimator reinforce --freezing_actor_steps 5"),
    ("train_ppo_ray", "--max_len 100"),
    ("train_ppo_ray", "--disable_ds_ckpt --save_steps 5"),
    ("train_ppo_ray", "--ema_beta 0.9"),
    ("train_ppo_ray", "--label_key gold"),
    ("train_ppo_ray", "--eval_steps 5"),
    ("train_ppo_ray", "--eval_temperature 0"),
]


@pytest.mark.parametrize(("command", "words"), NO_USE, ids=[" ".join(row) for row in NO_USE])
def test_a_flag_that_another_flag_makes_idle_is_said(command, words, capsys):
    classes = {
        "train_sft": SFTConfig,
        "train_rm": RewardModelConfig,
        "train_dpo": DPOConfig,
        "train_ppo_ray": RayPPOConfig,
    }
    good = {
        "train_sft": SFT[:4] if "pretrain_mode" in words else SFT,
        "train_rm": SFT[:4],
        "train_dpo": SFT[:4],
        "train_ppo_ray": PPO,
    }
    parse(classes[command], [*good[command], *words.split()], command)
    idle = words.split("--")[-1].split()[0]
    assert f"note: --{idle} has no effect here" in capsys.readouterr().err


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_what_a_pair_loss_does_not_read_is_told_by_its_entry(loss, capsys):
    facts = PAIR_LOSSES[loss]
    given = {"target_margin": "1", "label_smoothing": "0", "ref_pretrain": "r", "beta": "2"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    parse(DPOConfig, [*SFT[:4], "--loss", loss, *words], "train_dpo")
    idle = {line.split()[1][2:] for line in capsys.readouterr().err.splitlines() if "has no effect here" in line}
    unread = {name for name in given if name != "ref_pretrain" and name not in facts.flags}
    assert idle == unread | (set() if facts.needs_reference else {"ref_pretrain"})


@pytest.mark.parametrize(("loss", "told"), [("dpo", 0), ("simpo", 1)])
def test_there_is_no_reference_to_offload_where_the_loss_has_none(loss, told):
    values = {"zero_stage": 3, "ref_offload": True, "lora_rank": 0, "loss": loss, "pretrain": "p"}
    assert len(no_effect_notices(values, {"ref_offload"}, gpu=True)) == told


@pytest.mark.parametrize("flags", product((0, 1, 2, 3), (False, True)))
def test_optimizer_states_rest_where_the_flag_is_not_said_to_be_idle(flags):
    deepspeed = DeepSpeedConfig(zero_stage=flags[0], adam_offload=flags[1])
    config = RayPPOConfig(deepspeed=deepspeed, placement=PlacementConfig(deepspeed_enable_sleep=True))
    told = no_effect_notices(to_flat_dict(config), {"deepspeed_enable_sleep"}, gpu=True)
    assert config.optimizer_rests == (told == [])


def test_a_limit_that_leaves_no_room_for_an_answer_is_not_used():
    assert RolloutConfig(max_len=1024).max_model_len == RolloutConfig().max_model_len == 2048
    assert RolloutConfig(max_len=1025).max_model_len == 1025


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_never_hears_of_flags_that_its_stage_does_not_have(stage):
    config = DeepSpeedConfig(zero_stage=stage, overlap_comm=True, zpg=2)
    zero = train_config(config, bf16=False, max_norm=1.0, micro_batch_size=1, world_size=2)["zero_optimization"]
    assert zero["overlap_comm"] == zero.get("contiguous_gradients", False) == (stage >= 2)
    assert zero["zero_hpz_partition_size"] == (2 if stage == 3 else 1)


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        (
            "vllm",
            "--vllm_num_engines 1",
            "--vllm_num_engines needs vllm, which is not installed: pip install 'openrlhf[vllm]'",
        ),
        ("bitsandbytes", "--load_in_4bit --lora_rank 8", "--load_in_4bit needs bitsandbytes, which is not installed"),
        ("peft", "--lora_rank 8", "--lora_rank needs peft, which is not installed: pip install 'peft'"),
        ("wandb", "--use_wandb True", "--use_wandb needs wandb, which is not installed: pip install 'wandb'"),
        ("tensorboard", "--use_tensorboard t", "--use_tensorboard needs tensorboard"),
        ("modelscope", "--use_ms", "--use_ms needs modelscope, which is not installed: pip install 'modelscope'"),
        ("deepspeed", "", "the package deepspeed is not installed: pip install openrlhf"),
        ("ray", "", "the package ray is not installed: pip install openrlhf"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(module, words, says, monkeypatch):
    monkeypatch.setattr("openrlhf.config.flag_status.find_spec", lambda name: None if name == module else object())
    with pytest.raises(UsageError) as caught:
        parse(RayPPOConfig, [*PPO, *words.split()], "train_ppo_ray")
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(says)
    assert parse(RayPPOConfig, [*PPO, *words.split(), "--dry_run"], "train_ppo_ray")[1]
