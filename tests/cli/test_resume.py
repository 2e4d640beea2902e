"""A run that was cut and taken up again is bit for bit the run that was not: weights, optimizers, metrics, samples."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest

from tests.cli.resuming import Trial, failures
from tests.cli.supervised import answers, demonstrations, pairs, steps, write_rows
from tests.helpers import free_ports, tiny_folder
from tests.strategy.ranks import run_ranks
from tests.trainer.ppo.harness import NOISY_COUNT, reward_file, tiny_reward_model

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
# 3 steps an epoch, the last of them short; 4 micro-batches a step on one rank, 2 on two.
SHAPE = ("--train_batch_size=8", "--micro_train_batch_size=2", "--max_epochs=2", "--max_len=64", "--eval_split=train")
LEARNING = ("--learning_rate=3e-3", "--lr_warmup_ratio=0.4", "--logging_steps=2", "--eval_steps=2")
PPO_SHAPE = ("--rollout_batch_size=4", "--num_episodes=2", "--train_batch_size=4", "--micro_train_batch_size=2")
PPO_LENGTHS = ("--micro_rollout_batch_size=4", "--prompt_max_len=32", "--generate_max_len=6", "--save_value_network")
PPO_LEARNING = ("--actor_learning_rate=3e-3", "--critic_learning_rate=3e-3", "--lr_warmup_ratio=0.4", "--max_epochs=2")
QUESTIONS = ["How many clips did Natalia sell?", "What is 12 + 30?", "Write a short story about May."]
DTYPES = {"fp32": (), "bf16": ("--bf16",)}
OPTIMIZERS = {"": (), " offload": ("--adam_offload",)}
ESTIMATORS = ("gae", "group_norm")


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, tuple[str, ...]]:
    """The flags of every program: tiny models with dropout, rows of different length."""
    folder = tmp_path_factory.mktemp("material")
    base = tiny_folder(folder / "base", "gpt2", **DROPOUT)
    rows = write_rows(folder / "sft.jsonl", demonstrations(22))
    ranked = write_rows(folder / "rm.jsonl", pairs(22))
    labelled = write_rows(folder / "kto.jsonl", answers(11))
    judged = write_rows(folder / "prm.jsonl", steps(22))
    teacher = tiny_folder(folder / "teacher", "gpt2", seed=1)
    prompts = write_rows(
        folder / "prompts.jsonl", [{"input": f"{QUESTIONS[n % 3]} {n}", "label": str(n)} for n in range(11)]
    )
    judge = tiny_reward_model(folder / "rm", "gpt2", mean=0.1, std=0.2, **DROPOUT)
    supervised = (f"--pretrain={base}", *SHAPE, *LEARNING)
    ppo = (f"--pretrain={base}", f"--prompt_data={prompts}", "--label_key=label", *PPO_SHAPE, *PPO_LENGTHS)
    evaluation = (f"--eval_dataset={prompts}", "--eval_split=train", "--eval_steps=2")
    return {
        "train_sft": (*supervised, f"--dataset={rows}", f"--eval_dataset={rows}", *SFT_KEYS),
        "train_rm": (*supervised, f"--dataset={ranked}", f"--eval_dataset={ranked}", "--prompt_key=prompt"),
        "train_dpo": (
            *supervised,
            f"--dataset={ranked}",
            f"--eval_dataset={ranked}",
            *DPO_FLAGS,
            f"--ref_pretrain={teacher}",
        ),
        "train_kto": (*supervised, f"--dataset={labelled}", f"--eval_dataset={labelled}", *SFT_KEYS),
        "train_kd": (
            *supervised,
            f"--dataset={rows}",
            f"--eval_dataset={rows}",
            *SFT_KEYS,
            f"--teacher_model={teacher}",
        ),
        "train_prm": (*supervised, f"--dataset={judged}", f"--eval_dataset={judged}", *PRM_FLAGS),
        "train_ppo": (*ppo, *PPO_LEARNING, *evaluation),
        "gae": ("--advantage_estimator=gae", "--n_samples_per_prompt=1"),
        "group_norm": ("--advantage_estimator=group_norm", "--n_samples_per_prompt=2"),
        "model": (f"--reward_pretrain={judge}", "--normalize_reward"),
        "function": (f"--remote_rm_url={reward_file(folder, NOISY_COUNT)}",),
    }


DPO_FLAGS = ("--prompt_key=prompt", "--nll_loss_coef=0.1")
PRM_FLAGS = ("--placeholder_token=*", "--reward_tokens", "+", "-")
SFT_KEYS = ("--input_key=prompt", "--output_key=answer")


def assert_equal(folder: Path, trials: list[Trial], ranks: int = 1) -> None:
    """Do ``trials`` on ``ranks`` ranks and fail with what differs."""
    runs = sum(len(trial.cases) + 1 + bool(trial.broken_off) for trial in trials)
    fields = json.loads(json.dumps([asdict(trial) for trial in trials]))
    started = run_ranks(
        "tests.cli.resuming:run_trials", ranks, timeout=1800, folder=str(folder), trials=fields, ports=free_ports(runs)
    )
    assert started == [runs] * ranks
    assert failures(folder, trials) == {}


def supervised_trials(material: dict, programs=("train_sft", "train_rm"), stages=(2,)) -> list[Trial]:
    return [
        Trial(
            f"{program} {dtype}{optimizer} ZeRO-{stage}",
            program,
            (*material[program], *DTYPES[dtype], *OPTIMIZERS[optimizer], f"--zero_stage={stage}"),
        )
        for program, dtype, optimizer, stage in product(programs, DTYPES, OPTIMIZERS, stages)
    ]


def ppo_trials(material: dict) -> list[Trial]:
    return [
        Trial(
            f"ppo {estimator} {reward} {dtype}{optimizer}",
            "train_ppo",
            (*material["train_ppo"], *material[estimator], *material[reward], *DTYPES[dtype], *OPTIMIZERS[optimizer]),
            broken_off=6,
        )
        for estimator, reward, dtype, optimizer in product(ESTIMATORS, ("model", "function"), DTYPES, OPTIMIZERS)
    ]


def test_runs_taken_up_in_the_middle_at_an_edge_and_twice_are_the_whole_run_bit_for_bit(material, tmp_path):
    sft = supervised_trials(material, ("train_sft",))[2]
    gae = ppo_trials(material)[0]
    extra = ("--enable_ema", "--kl_target=0.05")
    trials = [replace(sft, cuts=(2, 3)), replace(gae, flags=(*gae.flags, *extra), cuts=(5,), twice=False)]
    assert_equal(tmp_path, trials)


@pytest.mark.full
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("program", ["train_sft", "train_rm", "train_dpo", "train_kto", "train_kd", "train_prm"])
def test_every_supervised_run_that_was_cut_is_the_whole_run_bit_for_bit(material, tmp_path, program, ranks):
    assert_equal(tmp_path, supervised_trials(material, (program,)), ranks)


@pytest.mark.full
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_way_to_shard_is_taken_up_bit_for_bit(material, tmp_path, stage):
    assert_equal(tmp_path, supervised_trials(material, ("train_sft",), (stage,)), ranks=2)


@pytest.mark.full
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("program", ["train_sft", "train_rm"])
def test_runs_that_share_sequences_or_cut_by_tokens_are_taken_up_bit_for_bit(material, tmp_path, program):
    plain = supervised_trials(material, (program,))[0]
    ways = (("--ring_attn_size=2",), ("--use_dynamic_batch", "--train_max_tokens_per_gpu=60"))
    trials = [replace(plain, name=way[0].strip("-"), flags=(*plain.flags, *way)) for way in (*ways, sum(ways, ()))]
    trials[2] = replace(trials[2], name="both")
    assert_equal(tmp_path, trials, ranks=2)


@pytest.mark.full
@pytest.mark.timeout(1900)
def test_runs_whose_reference_said_everything_before_are_taken_up_bit_for_bit(material, tmp_path):
    flags = ("--precompute_ref_log_probs", "--use_dynamic_batch", "--train_max_tokens_per_gpu=100")
    trials = [
        Trial(program, program, (*material[program], *flags), cuts=(3,), twice=False)
        for program in ("train_dpo", "train_kto")
    ]
    assert_equal(tmp_path, trials)


@pytest.mark.full
@pytest.mark.timeout(1900)
@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 2), (2, 3)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_ppo_run_that_was_cut_is_the_whole_run_bit_for_bit(material, tmp_path, estimator, ranks, stage):
    extras = {"gae model fp32": ("--enable_ema",), "group_norm function bf16": ("--kl_target=0.05",)}
    trials = [
        replace(
            trial,
            flags=(*trial.flags, f"--zero_stage={stage}", *extras.get(trial.name.removeprefix("ppo "), ())),
            broken_off=trial.broken_off // ranks,  # ranks share the backward passes of a step
        )
        for trial in ppo_trials(material)
        if estimator in trial.name and (stage == 2 or "offload" not in trial.name)
    ]
    assert_equal(tmp_path, trials, ranks)


ADAPTERS = ("--lora_rank=4", "--lora_dropout=0.1", "--learning_rate=1e-2")


def adapter_trial(material: dict, program: str, *flags: str, **options) -> Trial:
    name = " ".join([program, *flags]).replace("--", "")
    return Trial(name, program, (*material[program], *ADAPTERS, *flags), **options)


def test_a_run_on_four_bit_weights_that_was_cut_is_the_whole_run_bit_for_bit(material, tmp_path):
    flags = ("--load_in_4bit", "--bf16")
    assert_equal(tmp_path, [adapter_trial(material, "train_rm", *flags, cuts=(2,), broken_off=0, twice=False)])


@pytest.mark.full
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_run_with_adapters_that_was_cut_is_the_whole_run_bit_for_bit(material, tmp_path, ranks):
    trials = [
        adapter_trial(material, program, f"--zero_stage={stage}", *flags)
        for program, stage, flags in [
            ("train_sft", 0, ()),
            ("train_sft", 2, ("--bf16",)),
            ("train_sft", 3, ("--bf16",)),
            ("train_rm", 3, ()),
            ("train_sft", 2, ("--load_in_4bit", "--bf16", "--adam_offload")),
            ("train_rm", 1, ("--load_in_4bit",)),
        ]
    ]
    assert_equal(tmp_path, trials, ranks)
