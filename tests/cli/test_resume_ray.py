"""PPO on a real Ray, cut and taken up again: bit for bit the run that was not, with vLLM and without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.resuming import cut, differences, places, remember
from tests.cli.supervised import ROOT, metrics_of, write_rows
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import NOISY_COUNT, reward_file, tiny_reward_model

# 3 rollout steps an episode, the last of them short; 2 optimizer steps a rollout and pass.
SHAPE = ("--rollout_batch_size=4", "--num_episodes=2", "--train_batch_size=4", "--micro_train_batch_size=2")
LENGTHS = ("--micro_rollout_batch_size=4", "--prompt_max_len=256", "--generate_max_len=6", "--n_samples_per_prompt=2")
LEARNING = ("--actor_learning_rate=3e-3", "--critic_learning_rate=3e-3", "--lr_warmup_ratio=0.4", "--max_epochs=2")
PLACES = ("--critic_num_gpus_per_node=1", "--ref_num_gpus_per_node=1", "--reward_num_gpus_per_node=1")
ENGINE = ("--vllm_num_engines=1", "--vllm_sync_backend=gloo")
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
QUESTIONS = ["How many clips did Natalia sell?", "What is 12 + 30?", "Write a short story about May."]

GAE = ("--advantage_estimator=gae", "--enable_ema", "--kl_target=0.05", "--save_value_network")
GROUP_NORM = ("--advantage_estimator=group_norm", "--actor_num_gpus_per_node=2")
# Longer than a block of vLLM's cache, so that prompts of training and evaluation share some.
PREFACE = "Natalia sold clips to 48 of her friends, and then she sold half as many clips in May to a tiny robot. " * 4
SHARDED = ("--bf16", "--adam_offload", "--enable_prefix_caching", f"--input_template={PREFACE}{{}}")
RUNS = {
    "gae-model-vllm": ("model", (*GAE, *ENGINE, "--actor_num_gpus_per_node=1")),
    "group_norm-function-vllm-bf16": ("function", (*GROUP_NORM, *ENGINE, *SHARDED)),
    "group_norm-function-hf": ("function", GROUP_NORM),
}


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", *flags]


def environment() -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    return {**os.environ, **own}


def run(*flags: str) -> None:
    done = subprocess.run(command(*flags), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def run_and_kill(folder: Path, at_step: int, *flags: str) -> int:
    """Kill a run with SIGKILL while it is at ``at_step``; return the last step that it saved."""
    process = subprocess.Popen(command(*flags), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        before = folder / "ckpt" / f"global_step{at_step - 1}"
        while not before.is_dir() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL, "the run ended before it could be killed"
    saved = [int(path.name.removeprefix("global_step")) for path in (folder / "ckpt").glob("global_step*[0-9]")]
    return max(saved)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, tuple[str, ...]]:
    """The flags that all runs share, and those of the two kinds of reward."""
    folder = tmp_path_factory.mktemp("material")
    base = tiny_folder(folder / "base", "gpt2", hidden=64, **DROPOUT)  # vLLM on a CPU needs heads of 32 or more
    rows = [{"input": f"{QUESTIONS[n % 3]} {n}", "label": str(n)} for n in range(11)]
    prompts = write_rows(folder / "prompts.jsonl", rows)
    judge = tiny_reward_model(folder / "rm", "gpt2", mean=0.1, std=0.2, **DROPOUT)
    evaluation = (f"--eval_dataset={prompts}", "--eval_split=train", "--eval_steps=2")
    data = (f"--pretrain={base}", f"--prompt_data={prompts}", "--label_key=label")
    return {
        "shared": (*data, *SHAPE, *LENGTHS, *LEARNING, *PLACES, *evaluation),
        "model": (f"--reward_pretrain={judge}", "--normalize_reward"),
        "function": (f"--remote_rm_url={reward_file(folder, NOISY_COUNT)}",),
    }


@pytest.fixture(scope="module")
def whole(request, material, tmp_path_factory) -> tuple[tuple[str, ...], Path]:
    """The flags of a run and its folder when it came to its end without a cut."""
    reward, own = RUNS[request.param]
    if "vllm" in request.param:
        pytest.importorskip("vllm")
    flags = (*material["shared"], *material[reward], *own)
    folder = tmp_path_factory.mktemp("ray") / "whole"
    run(*flags, *places(folder))
    assert all(step["sync_gap"] < 2e-2 for step in metrics_of(folder / "model_run"))
    return flags, folder


def take_up(folder: Path, flags: tuple[str, ...]) -> Path:
    """Go on with the run that was cut in ``folder``."""
    remember(folder)
    run(*flags, *places(folder), "--load_checkpoint")
    return folder


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("whole", RUNS, indirect=True)
@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_on_ray_that_was_cut_is_the_whole_run_bit_for_bit(whole, tmp_path, step):
    flags, folder = whole
    cut(folder, tmp_path / "again", step)
    assert differences(folder, take_up(tmp_path / "again", flags), step) == []
    if step == 2:
        cut(tmp_path / "again", tmp_path / "twice", 4)
        assert differences(folder, take_up(tmp_path / "twice", flags), 4) == []


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("whole", RUNS, indirect=True)
def test_a_run_on_ray_that_was_killed_in_a_step_is_the_whole_run_bit_for_bit(whole, tmp_path):
    flags, folder = whole
    saved = run_and_kill(tmp_path, 3, *flags, *places(tmp_path))
    assert differences(folder, take_up(tmp_path, flags), saved) == []
