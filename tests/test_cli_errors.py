"""Wrong command lines: all problems in one message, each with its flag and the fix; heavy libraries stay out."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf.cli.common import run
from openrlhf.cli.train_ppo_ray import placement_problems
from openrlhf.config.arguments import parse
from openrlhf.config.chat import ChatConfig
from openrlhf.config.flags import flag_table
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.supervised import DPOConfig, KDConfig, KTOConfig, PRMConfig, RewardModelConfig, SFTConfig
from openrlhf.errors import DataError, InfraError, NumericError, UsageError
from tests.helpers import tiny_causal_lm, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "train_sft": SFTConfig,
    "train_rm": RewardModelConfig,
    "train_dpo": DPOConfig,
    "train_kto": KTOConfig,
    "train_kd": KDConfig,
    "train_prm": PRMConfig,
    "train_ppo": PPOConfig,
    "train_ppo_ray": RayPPOConfig,
    "batch_inference": BatchInferenceConfig,
    "interactive_chat": ChatConfig,
}
GOOD = {
    "train_sft": "--pretrain m --dataset d --output_key answer",
    "train_rm": "--pretrain m --dataset d",
    "train_dpo": "--pretrain m --dataset d",
    "train_kto": "--pretrain m --dataset d --output_key answer",
    "train_kd": "--pretrain m --teacher_model t --dataset d",
    "train_prm": "--pretrain m --dataset d --placeholder_token X",
    "train_ppo": "--pretrain m --prompt_data d --reward_pretrain r",
    "train_ppo_ray": "--pretrain m --prompt_data d --reward_pretrain r",
    "batch_inference": "--eval_task rm --pretrain m --dataset d --output_path o",
    "interactive_chat": "--pretrain m",
}
WRONG = [
    ("train_sft", "--learning_rat 1", "unknown flag --learning_rat: did you mean --learning_rate?"),
    ("train_sft", "--learning-rate 1", "unknown flag --learning-rate: did you mean --learning_rate?"),
    ("train_sft", "--zero_stge=2", "unknown flag --zero_stge: did you mean --zero_stage?"),
    ("train_sft", "--dryrun", "unknown flag --dryrun: did you mean --dry_run?"),
    ("train_sft", "--BF16", "unknown flag --BF16: did you mean --bf16?"),
    ("train_sft", "--micro_train", "unknown flag --micro_train: did you mean --micro_train_batch_size?"),
    ("train_sft", "--qqqqqq 1", "unknown flag --qqqqqq: see --help for the flags of this command"),
    ("train_sft", "--no-bf16", "unknown flag --no-bf16"),
    ("train_sft", "--seed ten", "--seed takes a whole number, got 'ten'"),
    ("train_sft", "--seed 1.5", "--seed takes a whole number, got '1.5'"),
    ("train_sft", "--seed -1", "--seed must be at least 0, got -1"),
    ("train_sft", "--learning_rate fast", "--learning_rate takes a number, got 'fast'"),
    ("train_sft", "--learning_rate nan", "--learning_rate takes a number, got 'nan'"),
    ("train_sft", "--learning_rate inf", "--learning_rate must be finite"),
    ("train_sft", "--learning_rate -1e-5", "--learning_rate must be at least 0, got -1e-05"),
    ("train_sft", "--learning_rate", "--learning_rate takes one value, got none"),
    ("train_sft", "--adam_betas 0.9", "--adam_betas takes 2 values, got 1: 0.9"),
    ("train_sft", "--adam_betas 0.9 1.5", "--adam_betas must be at most 1, got 1.5"),
    ("train_sft", "--target_modules", "--target_modules takes one value or more, got none"),
    ("train_sft", "--dataset a b", "--dataset takes one value, got 2: a b"),
    ("train_sft", "--bf16 yes", "--bf16 is a switch and takes no value, got: yes"),
    ("train_sft", "--zero_stage 4", "--zero_stage must be one of 0, 1, 2, 3, got '4'"),
    ("train_sft", "--lr_scheduler cosin", "--lr_scheduler must be one of cosine_with_min_lr, cosine,"),
    ("train_sft", "--grad_accum_dtype int8", "--grad_accum_dtype must be one of fp32, bf16, fp16"),
    ("train_sft", "--train_batch_size 0", "--train_batch_size must be at least 1, got 0"),
    ("train_sft", "--train_batch_size 4", "--micro_train_batch_size 8 is larger than --train_batch_size 4"),
    ("train_sft", "--multiturn", "--multiturn needs --apply_chat_template"),
    ("train_sft", "--multiturn --apply_chat_template --pretrain_mode", "--multiturn and --pretrain_mode exclude"),
    ("train_sft", "--dataset a,b", "--dataset_probs has 1 values for the 2 data sets of --dataset"),
    ("train_sft", "--dataset_probs half", "--dataset_probs 'half' is not a list of numbers"),
    ("train_sft", "--dataset a,b --dataset_probs=-1,2", "probabilities are not negative"),
    ("train_sft", "--dataset_probs nan", "probabilities are not negative, and finite"),
    ("train_sft", "--dataset a,b --dataset_probs 0.5,0.6", "add up to 1.1, they must add up to 1"),
    ("train_sft", "--input_template {}{name}", "--input_template '{}{name}' needs one {}"),
    ("train_sft", "--input_template {}{}", "--input_template '{}{}' needs one {}"),
    ("train_sft", "--input_template {{}}", "--input_template '{{}}' needs one {}"),
    ("train_sft", "--zero_stage 0 --grad_accum_dtype bf16", "--grad_accum_dtype bf16 needs --zero_stage 1, 2 or 3"),
    ("train_rm", "--zero_stage 0 --grad_accum_dtype fp32 --bf16", "--grad_accum_dtype fp32 needs --zero_stage"),
    ("train_sft", "--save_steps 0", "--save_steps 0 is not a cadence: use -1 for never"),
    ("train_sft", "--eval_steps 0", "--eval_steps 0 is not a cadence"),
    ("train_sft", "--dry_run yes", "--dry_run is a switch and takes no value, got: yes"),
    ("train_sft", "--config", "--config takes one YAML file"),
    ("train_sft", "--load_in_4bit", "--load_in_4bit needs --lora_rank: 4-bit weights cannot be trained"),
    ("train_rm", "--load_in_4bit --lora_rank 8 --zero_stage 3", "--load_in_4bit cannot be sharded by --zero_stage 3"),
    ("train_ppo_ray", "--load_in_4bit --lora_rank 0", "--load_in_4bit needs --lora_rank"),
    ("train_sft", "--lora_dropout 2", "--lora_dropout must be at most 1, got 2"),
    (
        "train_rm",
        "--aux_loss_coef 0.1 --gradient_checkpointing_use_reentrant",
        "--aux_loss_coef has no gradient through --gradient_checkpointing_use_reentrant",
    ),
    ("train_rm", "--multiturn", "unknown flag --multiturn"),
    ("train_rm", "--max_len 1", "--max_len must be at least 2, got 1"),
    ("train_sft", "--dataset a,,b", "--dataset 'a,,b': an entry between the commas is empty"),
    ("train_sft", "--eval_dataset a,", "--eval_dataset 'a,': an entry between the commas is empty"),
    ("train_sft", "--output_key input", "--input_key and --output_key both name the column 'input'"),
    ("train_sft", "--too_long truncate", "--too_long must be one of cut, drop, error, got 'truncate'"),
    ("train_sft", "--special_tokens_in_text yes", "--special_tokens_in_text must be one of text, token, error"),
    ("train_sft", "--show_sample", "unknown flag --show_sample: did you mean --show_samples?"),
    ("train_sft", "--max_sample 5", "unknown flag --max_sample: did you mean --max_samples?"),
    ("train_sft", "--eval_stteps 5", "unknown flag --eval_stteps: did you mean --eval_steps?"),
    ("train_rm", "--chosen better", "unknown flag --chosen: did you mean --chosen_key?"),
    ("train_rm", "--reject_key worse", "unknown flag --reject_key: did you mean --rejected_key?"),
    ("train_rm", "--chosen_key rejected", "--chosen_key and --rejected_key both name the column 'rejected'"),
    ("train_rm", "--prompt_key chosen", "--prompt_key and --chosen_key both name the column 'chosen'"),
    ("train_rm", "--train_batch_size 2 --micro_train_batch_size 3", "--micro_train_batch_size 3 is larger than"),
    ("train_rm", "--dataset a,b --dataset_probs 0.5", "--dataset_probs has 1 values for the 2 data sets"),
    ("train_dpo", "--loss kto", "--loss must be one of dpo, ipo, simpo, orpo, kto_pair, got 'kto'"),
    ("train_dpo", "--ipo --loss simpo", "--ipo and --loss simpo exclude each other: drop one"),
    ("train_dpo", "--ipo --label_smoothing 0.1", "--label_smoothing needs --loss dpo, not ipo"),
    ("train_dpo", "--loss orpo --label_smoothing 0.1", "--label_smoothing needs --loss dpo, not orpo"),
    ("train_dpo", "--loss orpo --nll_loss_coef 1", "--nll_loss_coef and --loss orpo exclude each other"),
    ("train_dpo", "--label_smoothing 0.6", "--label_smoothing must be at most 0.5, got 0.6"),
    ("train_dpo", "--beta 0", "--beta must be above 0, got 0"),
    ("train_dpo", "--prompt_key chosen", "--prompt_key and --chosen_key both name the column 'chosen'"),
    ("train_kto", "--beta -1", "--beta must be above 0, got -1"),
    ("train_kto", "--train_batch_size 1 --micro_train_batch_size 1", "--train_batch_size 1 leaves no other answer"),
    ("train_kto", "--undesirable_loss_weight -1", "--undesirable_loss_weight must be at least 0, got -1"),
    ("train_kto", "--label_key answer", "--output_key and --label_key both name the column 'answer'"),
    ("train_kto", "--multiturn", "unknown flag --multiturn"),
    ("train_kd", "--kd_coef 1.5", "--kd_coef must be at most 1, got 1.5"),
    ("train_prm", "--reward_tokens +", "--reward_tokens +: give two different tokens or more"),
    ("train_prm", "--reward_tokens + +", "--reward_tokens + +: give two different tokens or more"),
    ("train_prm", "--label_key input", "--input_key and --label_key both name the column 'input'"),
    ("train_ppo_ray", "--prompt_data a,", "--prompt_data 'a,': an entry between the commas is empty"),
    ("train_ppo_ray", "--prompt_data a,b", "--prompt_data_probs has 1 values for the 2 data sets of --prompt_data"),
    ("train_ppo_ray", "--train_batch_size 2", "--micro_train_batch_size 4 is larger than --train_batch_size 2"),
    ("train_ppo_ray", "--colocate_actor_ref --ref_num_gpus_per_node 2", "--colocate_actor_ref shares devices"),
    ("train_ppo_ray", "--colocate_actor_ref --actor_num_nodes 2", "--ref_num_nodes 1 --ref_num_gpus_per_node 8"),
    ("train_ppo_ray", "--colocate_critic_reward --reward_num_nodes 2", "--colocate_critic_reward shares devices"),
    ("train_ppo_ray", "--colocate_all_models --critic_num_nodes 2", "--colocate_all_models shares devices"),
    (
        "train_ppo_ray",
        "--colocate_all_models --vllm_num_engines 2",
        "--vllm_num_engines is 2, --vllm_tensor_parallel_size 1; their product",
    ),
    ("train_ppo_ray", "--advantage_estimator grpo", "must be one of gae, reinforce, reinforce_baseline, rloo"),
    ("train_ppo_ray", "--advantage_estimator group_norm", "group_norm compares answers to one prompt"),
    (
        "train_ppo_ray",
        "--dynamic_filtering --dynamic_filtering_reward_range 0 1",
        "--dynamic_filtering compares answers to one prompt: --n_samples_per_prompt",
    ),
    (
        "train_ppo_ray",
        "--dynamic_filtering_reward_range 1 0",
        "--dynamic_filtering_reward_range 1 0: the first",
    ),
    (
        "train_ppo_ray",
        "--n_samples_per_prompt 2 --dynamic_filtering",
        "goes by the score of a reward model, which may lie anywhere: say with --dynamic_filtering_reward_range",
    ),
    (
        "train_ppo_ray",
        "--n_samples_per_prompt 2 --dynamic_filtering --remote_rm_url http://127.0.0.1:5000",
        "goes by the sum of several reward sources, which may lie anywhere",
    ),
    (
        "train_ppo_ray",
        "--n_samples_per_prompt 2 --dynamic_filtering --dynamic_filtering_reward_range 0 1 "
        "--advantage_estimator remax",
        "--dynamic_filtering and --advantage_estimator remax exclude each other",
    ),
    ("train_ppo_ray", "--policy_loss_type vapo", "--policy_loss_type must be one of ppo, gspo, cispo, got 'vapo'"),
    ("train_ppo_ray", "--dual_clip 1", "--dual_clip must be above 1, got 1"),
    ("train_ppo_ray", "--eps_clip_low_high 0.2", "--eps_clip_low_high takes 2 values, got 1: 0.2"),
    ("train_ppo_ray", "--use_kl_loss --init_kl_coef 0", "--use_kl_loss weighs the KL with --init_kl_coef, which is 0"),
    ("train_ppo_ray", "--kl_estimator k2 --use_kl_estimator_k3", "--kl_estimator k2 and --use_kl_estimator_k3 excl"),
    ("train_ppo_ray", "--overlong_buffer_len 2000", "--overlong_buffer_len 2000 is more than --generate_max_len 1024"),
    ("train_ppo_ray", "--stop_properly_penalty_coef 2", "--stop_properly_penalty_coef must be at most 1, got 2"),
    ("train_ppo_ray", "--vllm_is_truncated_threshold 2 1", "--vllm_is_truncated_threshold 2 1: give the smallest"),
    ("train_ppo_ray", "--vllm_is_truncated_threshold 1 2 3", "--vllm_is_truncated_threshold 1 2 3: give the smallest"),
    ("train_ppo_ray", "--advantage_estimator rloo", "--n_samples_per_prompt must be above 1, it is 1"),
    ("train_ppo_ray", "--reward_clip_range 10 -10", "--reward_clip_range 10 -10: the first must be below the second"),
    ("train_ppo_ray", "--reward_clip_range -10", "--reward_clip_range takes 2 values, got 1: -10"),
    ("train_ppo_ray", "--kl_target 0.1 --init_kl_coef 0", "--kl_target 0.1 scales --init_kl_coef, which is 0"),
    ("train_ppo_ray", "--input_template {}{name}", "--input_template '{}{name}' needs one {}"),
    ("train_ppo_ray", "--temperature 0", "--temperature must be above 0, got 0"),
    ("train_ppo_ray", "--top_p 1.5", "--top_p must be at most 1, got 1.5"),
    ("train_ppo_ray", "--eval_temperature -1", "--eval_temperature must be at least 0, got -1"),
    ("train_ppo_ray", "--vllm_num_engines -1", "--vllm_num_engines must be at least 0, got -1"),
    ("train_ppo_ray", "--vllm_sync_backend mpi", "--vllm_sync_backend must be one of nccl, gloo, got 'mpi'"),
    ("train_ppo_ray", "--remote_rm_url localhost:5000", "is neither a .py file nor a URL"),
    ("train_ppo_ray", "--remote_rm_url nowhere.py", "--remote_rm_url nowhere.py: there is no such file"),
    ("train_ppo_ray", "--remote_rm_url http://a:1/r,b", "--remote_rm_url b is neither a .py file nor a URL"),
    ("train_ppo_ray", "--remote_rm_url file:///etc/passwd", "not an address of a web server; write http://HOST:PORT"),
    ("train_ppo_ray", "--remote_rm_url gopher://a/", "not an address of a web server"),
    ("train_ppo_ray", "--remote_rm_url http://a:port/", "write http://HOST:PORT/PATH"),
    ("train_ppo_ray", "--remote_rm_url http://me:pw@a/", "leave name and password out of the address of a"),
    ("train_ppo_ray", "--remote_rm_url http://169.254.169.254/", "link-local addresses are the machine's own"),
    ("train_ppo_ray", "--remote_rm_url http://[fe80::1]/", "link-local addresses are the machine's own"),
    ("train_ppo_ray", "--remote_rm_mode mean", "--remote_rm_mode must be one of sum, replicas, got 'mean'"),
    ("train_ppo_ray", "--remote_rm_key s3cret", "--remote_rm_key names neither a file nor an environment variable"),
    ("train_ppo_ray", "--reward_func_env NO_SUCH_KEY", "--reward_func_env NO_SUCH_KEY: there is no such environment"),
    ("train_ppo_ray", "--reward_weights 1,a", "--reward_weights '1,a' is not a list of numbers"),
    ("train_ppo_ray", "--reward_weights 1,inf", "one finite weight for each of the"),
    ("train_ppo_ray", "--eval_reward_func check.sh", "--eval_reward_func check.sh is not a .py file"),
    ("train_ppo_ray", "--eval_reward_func nowhere.py", "--eval_reward_func nowhere.py: there is no such file"),
]


@pytest.mark.parametrize(("command", "words", "expected"), WRONG, ids=[f"{row[0]} {row[1]}" for row in WRONG])
def test_a_wrong_command_line_names_flag_and_fix(command, words, expected):
    with pytest.raises(UsageError) as caught:
        also = placement_problems if command == "train_ppo_ray" else None
        parse(COMMANDS[command], [*GOOD[command].split(), *words.split()], command, also)
    assert len(caught.value.problems) == 1
    assert expected in caught.value.problems[0]


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train_sft", ["--pretrain", "--dataset", "--output_key"]),
        ("train_rm", ["--pretrain", "--dataset"]),
        ("train_kto", ["--output_key"]),
        ("train_kd", ["--pretrain", "--teacher_model", "--dataset"]),
        ("train_prm", ["--pretrain", "--dataset", "--placeholder_token"]),
    ],
)
def test_required_flags_are_named_together(command, missing):
    with pytest.raises(UsageError) as caught:
        parse(COMMANDS[command], [], command)
    assert [problem.split()[0] for problem in caught.value.problems] == missing


def test_simpo_with_the_beta_of_dpo_is_told(capsys):
    parse(DPOConfig, [*GOOD["train_dpo"].split(), "--loss", "simpo"], "train_dpo")
    assert "--loss simpo with --beta 0.1 learns little" in capsys.readouterr().err


def test_ipo_by_its_old_flag_and_by_name_are_one(capsys):
    words = GOOD["train_dpo"].split()
    found = [parse(DPOConfig, [*words, *own], "train_dpo")[0] for own in (["--ipo"], ["--loss", "ipo"])]
    assert found[0].pair_loss is found[1].pair_loss and found[0].reference == "m"


def test_ppo_without_any_flag_names_model_prompts_and_reward():
    with pytest.raises(UsageError) as caught:
        parse(RayPPOConfig, [], "train_ppo_ray")
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert all(name in text for name in ("--pretrain", "--prompt_data", "--reward_pretrain"))


def test_all_problems_come_in_one_message():
    words = (
        "stray --pretran m --seed ten --bf16 maybe --advantage_estimator rloo --load_in_4bit --reward_clip_range 3 1"
    )
    with pytest.raises(UsageError) as caught:
        parse(RayPPOConfig, words.split(), "train_ppo_ray")
    text = str(caught.value)
    for part in ("'stray'", "--pretran:", "--seed", "--bf16", "--n_samples_per_prompt", "--reward_clip_range"):
        assert part in text
    assert "--load_in_4bit needs" in text and "--prompt_data is missing" in text
    assert "--pretrain is missing" not in text


@pytest.mark.parametrize("words", ["--output_key a", "--apply_chat_template", "--pretrain_mode"])
def test_each_kind_of_demonstration_is_enough(words):
    assert parse(SFTConfig, ["--pretrain", "m", "--dataset", "d", *words.split()], "train_sft")[0]


def test_a_template_that_is_not_used_may_have_any_braces():
    words = [*GOOD["train_ppo_ray"].split(), "--apply_chat_template", "--input_template", "{}{name}"]
    assert parse(RayPPOConfig, words, "train_ppo_ray")[0].prompts.apply_chat_template


def test_doubled_braces_in_a_template_are_text():
    config = parse(SFTConfig, [*GOOD["train_sft"].split(), "--input_template", "{{json}} {}"], "train_sft")[0]
    assert config.data.input_template == "{{json}} {}"


def test_what_the_command_finds_wrong_itself_joins_the_other_problems(capsys):
    with pytest.raises(SystemExit):
        run(SFTConfig, print, "train_sft", argv=["--seed", "x"], problems=lambda config: ["--save_path: mine"])
    text = capsys.readouterr().err
    assert "--seed takes a whole number" in text and "--pretrain is missing" in text and "--save_path: mine" in text


def test_a_normalised_reward_without_a_reward_model_is_told_and_changes_nothing(tmp_path):
    (tmp_path / "reward.py").touch()
    words = ["--pretrain", "m", "--prompt_data", "d", "--remote_rm_url", str(tmp_path / "reward.py")]
    for flags, told in (([], 1), (["--critic_pretrain", "rm"], 0)):
        config, _ = parse(RayPPOConfig, [*words, "--normalize_reward", *flags], "train_ppo_ray")
        assert sum("--normalize_reward has no effect" in notice for notice in config.notices()) == told


@pytest.mark.parametrize("gpu", [True, False])
def test_an_offloaded_optimizer_without_zero_is_an_error_where_there_is_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr("openrlhf.config.groups.gpu_present", lambda: gpu)
    words = [*GOOD["train_sft"].split(), "--adam_offload", "--zero_stage", "0"]
    if gpu:
        with pytest.raises(UsageError, match="--adam_offload needs --zero_stage 1, 2 or 3"):
            parse(SFTConfig, words, "train_sft")
    else:
        assert parse(SFTConfig, words, "train_sft")[0].deepspeed.adam_offload


def test_flags_of_a_gpu_run_on_a_cpu_with_a_note_each(monkeypatch, capsys):
    monkeypatch.setattr("openrlhf.config.arguments.gpu_present", lambda: False)
    gpu_flags = "--bf16 --flash_attn --actor_init_on_gpu --vllm_enable_sleep --vllm_gpu_memory_utilization 0.5"
    parse(RayPPOConfig, [*GOOD["train_ppo_ray"].split(), *gpu_flags.split()], "train_ppo_ray")
    noted = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert sorted(noted) == sorted(word for word in gpu_flags.split() if word.startswith("--") and word != "--bf16")


def test_groups_that_cannot_share_devices_come_with_the_other_problems():
    done, _ = spy("train_ppo_ray", "--pretrain", "m", "--colocate_actor_ref", "--ref_num_gpus_per_node", "2")
    assert done.returncode == 2
    assert "--colocate_actor_ref shares devices" in done.stderr and "--prompt_data is missing" in done.stderr
    assert "heavy: []" in done.stderr


def test_a_flag_that_could_not_be_read_is_not_judged_again():
    words = [*GOOD["train_ppo_ray"].split(), "--advantage_estimator", "rloo", "--n_samples_per_prompt", "four"]
    with pytest.raises(UsageError) as caught:
        parse(RayPPOConfig, words, "train_ppo_ray")
    assert caught.value.problems == ["--n_samples_per_prompt takes a whole number, got 'four'"]


def outcome(train, *words, monkeypatch=None):
    with pytest.raises(SystemExit) as stop:
        run(SFTConfig, train, "train_sft", argv=[*GOOD["train_sft"].split(), *words])
    return stop.value.code


@pytest.mark.parametrize("error", [UsageError("u"), DataError("d"), InfraError("i"), NumericError("n")])
def test_an_error_of_ours_is_one_message_and_its_exit_status(error, capsys):
    def train(config):
        raise error

    assert outcome(train) == error.exit_code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_ends_without_a_traceback(capsys):
    def train(config):
        raise KeyboardInterrupt

    assert outcome(train) == 143
    assert capsys.readouterr().err == "stopped by SIGINT: no step was lost\n"


def test_several_problems_are_a_list(capsys):
    assert outcome(lambda config: None, "--seed", "x", "--max_len", "y") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems; --help lists the flags",
        "  --seed takes a whole number, got 'x'",
        "  --max_len takes a whole number, got 'y'",
    ]


def test_only_the_first_rank_prints_a_wrong_flag(monkeypatch, capsys):
    def train(config):
        raise UsageError("a flag")

    monkeypatch.setenv("RANK", "1")
    assert outcome(train) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [InfraError("the disk is full"), DataError("row 7 is empty")])
def test_every_rank_prints_what_another_may_not_have_seen(error, monkeypatch, capsys):
    def train(config):
        raise error

    monkeypatch.setenv("RANK", "1")
    assert outcome(train) == error.exit_code
    assert str(error) in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback():
    def train(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(SFTConfig, train, "train_sft", argv=GOOD["train_sft"].split())


def test_a_good_command_line_trains_with_its_configuration():
    seen = []
    run(SFTConfig, seen.append, "train_sft", argv=[*GOOD["train_sft"].split(), "--seed", "7"])
    assert seen[0].batch.seed == 7


def test_a_dry_run_prints_the_plan_and_does_not_train(monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(SFTConfig, seen.append, "train_sft", argv=[*GOOD["train_sft"].split(), "--dry_run"])
    assert seen == [] and "2 ranks x 8 micro-batches of at most 8" in capsys.readouterr().out


def test_a_command_may_bring_its_own_plan(capsys):
    words = [*GOOD["train_sft"].split(), "--dry_run"]
    run(SFTConfig, print, "train_sft", plan=lambda config, ranks: [f"{ranks} of mine"], argv=words)
    assert capsys.readouterr().out == "1 of mine\n"


SPY = """
import runpy, sys
command = sys.argv[1]
sys.argv = [command, *sys.argv[2:]]
code = 0
try:
    runpy.run_module("openrlhf.cli." + command, run_name="__main__")
except SystemExit as stop:
    code = stop.code or 0
heavy = {"torch", "ray", "vllm", "transformers", "deepspeed", "datasets", "wandb", "matplotlib"} & set(sys.modules)
print("heavy:", sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


def cpu_seconds():
    """The work of the children so far: unlike the clock it does not depend on what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spy(command, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-c", SPY, command, *words], env=environment, capture_output=True, text=True, timeout=60
    )
    return done, cpu_seconds() - before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_imports_nothing_heavy(command):
    done, seconds = spy(command, "--help")
    assert done.returncode == 0 and "--pretrain STR" in done.stdout
    assert "heavy: []" in done.stderr
    assert seconds < 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_error_is_quick_and_imports_nothing_heavy(command):
    done, seconds = spy(command, "--pretran", "m")
    assert done.returncode == 2 and "did you mean --pretrain?" in done.stderr
    assert "heavy: []" in done.stderr and "Traceback" not in done.stderr
    assert seconds < 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_loads_nothing_and_ends_with_zero(command):
    launched = ["--local_rank=0"] if "local_rank" in flag_table(COMMANDS[command]) else []
    done, _ = spy(command, *GOOD[command].split(), "--dry_run", *launched)
    assert done.returncode == 0 and "plan:" in done.stdout
    assert "heavy: []" in done.stderr


def test_a_dry_run_can_show_samples_of_local_data_without_loading_a_model(tmp_path):
    tiny_tokenizer(tmp_path / "model")
    tiny_causal_lm(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"input": "12 + 30?", "output": "42"}\n' * 4)
    words = [
        "--pretrain",
        str(tmp_path / "model"),
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--output_key",
        "output",
    ]
    done, _ = spy("train_sft", *words, "--dry_run", "--show_samples")
    assert done.returncode == 0, done.stderr
    shown = done.stdout[done.stdout.index("samples  3 of 4 rows") :].splitlines()
    assert shown[1].strip() == r"1 User: 12 + 30?\nAssistant: «42<|im_end|>»"
    assert "deepspeed" not in done.stderr.partition("heavy:")[2]


def test_a_dry_run_does_not_ask_the_hub_for_samples():
    done, _ = spy("train_sft", *GOOD["train_sft"].split(), "--dry_run", "--show_samples")
    assert done.returncode == 3 and "plan:" in done.stdout
    assert "error: --pretrain m: no such folder here, and the hub cannot be reached" in done.stderr
