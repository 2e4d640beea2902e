"""PPO on a real Ray, end to end: with two actors and no engine, and with a reward model, a critic and vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from openrlhf.config.groups import BatchConfig, CheckpointConfig
from openrlhf.config.ppo import AlgorithmConfig, PPOOptimConfig, RolloutConfig
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import local_loop, policy_weights, reward_file, tiny_ppo_config, tiny_reward_model

ONE_EACH = [f"--{role}_num_gpus_per_node=1" for role in ("actor", "critic", "ref", "reward")]
QUESTIONS = ["How many clips did Natalia sell?", "What is 12 + 30?", "Write a short story.", "What is the answer?"] * 4


def ppo(*flags: str, cwd: Path, timeout: int = 300, cluster: str = "local") -> subprocess.CompletedProcess:
    """Run the command in ``cwd``, by default on a Ray of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": cluster}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def data(folder: Path) -> list[str]:
    """Write prompts and a policy to ``folder`` and return the flags that both kinds of run share."""
    tiny_folder(folder / "policy", hidden=64)  # vLLM on a CPU needs heads of 32 or more
    lines = [json.dumps({"input": text, "label": str(number)}) for number, text in enumerate(QUESTIONS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return [
        *("--pretrain", "policy", "--prompt_data", "prompts.jsonl", "--input_key", "input", "--label_key", "label"),
        *("--save_path", "out", "--ckpt_path", "ckpt", "--prompt_max_len", "32", "--generate_max_len", "6"),
        *("--rollout_batch_size", "8", "--micro_rollout_batch_size", "4", "--micro_train_batch_size", "2"),
        *("--actor_learning_rate", "3e-3", "--critic_learning_rate", "3e-3", "--lr_warmup_ratio", "0"),
    ]


def metrics(folder: Path, phase: str = "train") -> list[dict]:
    """Return the lines of a phase in ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["phase"] == phase]


def test_two_ray_actors_train_the_same_policy_as_one_process(tmp_path):
    flags = [*data(tmp_path), "--actor_num_gpus_per_node", "2", "--ref_num_gpus_per_node", "1", "--zero_stage", "2"]
    rewards = reward_file(tmp_path)
    flags += ["--remote_rm_url", rewards, "--advantage_estimator", "rloo", "--n_samples_per_prompt", "2"]
    done = ppo(*flags, "--train_batch_size", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    noise = "(WorkerHost pid="
    assert noise in (tmp_path / "out_run" / "log.txt").read_text()
    assert noise not in done.stdout + done.stderr

    config = tiny_ppo_config(tmp_path, algorithm=AlgorithmConfig(advantage_estimator="rloo"))
    config = replace(
        config,
        rollout=RolloutConfig(
            rollout_batch_size=8, micro_rollout_batch_size=4, generate_max_len=6, n_samples_per_prompt=2
        ),
        batch=BatchConfig(micro_train_batch_size=4, train_batch_size=16),
        optim=PPOOptimConfig(actor_learning_rate=3e-3, lr_warmup_ratio=0.0),
        checkpoint=CheckpointConfig(save_path=str(tmp_path / "local"), ckpt_path=str(tmp_path / "local_ckpt")),
    )
    loop, recorder = local_loop(config, texts=QUESTIONS)
    loop.fit()

    for there, here in zip(metrics(tmp_path / "out_run"), recorder.steps, strict=True):
        for name in ("reward", "kl", "policy_loss", "response_length", "actor_grad_norm"):
            assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-5), name
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in policy_weights(loop).items():
        torch.testing.assert_close(saved[name.removeprefix("model.")], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.full
def test_gae_with_a_reward_model_and_vllm_saves_resumes_and_reports(tmp_path):
    pytest.importorskip("vllm")
    tiny_reward_model(tmp_path / "rm", mean=0.0, std=0.1)
    flags = [*data(tmp_path), *ONE_EACH, "--reward_pretrain", "rm", "--normalize_reward", "--train_batch_size", "4"]
    flags += ["--vllm_num_engines", "1", "--vllm_sync_backend", "gloo", "--save_value_network", "--save_steps", "1"]
    flags += ["--eval_dataset", "prompts.jsonl", "--eval_reward_func", reward_file(tmp_path)]
    done = ppo(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "out_run")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["sync_gap_max"] < 1e-5 for step in steps)
    assert steps[1]["kl"] != 0.0
    assert [line["step"] for line in metrics(tmp_path / "out_run", "eval")] == [0, 2]
    assert (tmp_path / "out_run" / "report.html").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out_critic")

    again = ppo(*flags, "--load_checkpoint", "--num_episodes", "2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "global_step2" in again.stdout
    assert [step["step"] for step in metrics(tmp_path / "out_run")] == [1, 2, 3, 4]


def test_a_dry_run_prints_who_shares_which_device_and_starts_nothing(tmp_path):
    flags = ["--pretrain", "p", "--reward_pretrain", "r", "--prompt_data", "d", "--colocate_actor_ref", *ONE_EACH]
    done = ppo(*flags, "--dry_run", cwd=tmp_path, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "actor x1, ref x1 share" in done.stdout
    assert "3 device slots" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_what_each_role_needs_in_memory(tmp_path):
    model = ["--pretrain", "OpenRLHF/Llama-3-8b-sft-mixture", "--reward_pretrain", "OpenRLHF/Llama-3-8b-rm-mixture"]
    engines = ["--vllm_num_engines", "2", "--vllm_tensor_parallel_size", "2", "--bf16", "--zero_stage", "3"]
    shared = ["--prompt_data", "d", "--colocate_actor_ref", "--colocate_critic_reward", "--adam_offload"]
    done = ppo(*model, *engines, *shared, *ONE_EACH, "--dry_run", cwd=tmp_path, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "4 slots: vllm x2 (tp 2)" in done.stdout
    assert "actor, ref: " in done.stdout and "GiB a device (train actor); fits" in done.stdout
    assert "of main memory a rank on top" in done.stdout


def test_groups_that_share_devices_must_be_equal(tmp_path):
    flags = ["--pretrain", "p", "--reward_pretrain", "r", "--prompt_data", "d", "--colocate_actor_ref", *ONE_EACH]
    done = ppo(*flags, "--ref_num_gpus_per_node", "2", "--rollout_batch_size", "8", cwd=tmp_path, timeout=30)
    assert done.returncode == 2
    assert "--colocate_actor_ref" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_prompts_are_found_before_any_worker_starts(tmp_path):
    flags = [*data(tmp_path), "--remote_rm_url", reward_file(tmp_path), "--prompt_data", "nowhere.jsonl", *ONE_EACH]
    done = ppo(*flags, cwd=tmp_path, timeout=60)
    assert done.returncode == 3
    assert "nowhere.jsonl" in done.stderr
    assert "starting the workers" not in done.stdout


@pytest.mark.full
def test_sharded_bf16_actors_feed_vllm_and_export_their_average(tmp_path):
    pytest.importorskip("vllm")
    tiny_reward_model(tmp_path / "rm", mean=0.0, std=0.1)
    flags = [*data(tmp_path), "--actor_num_gpus_per_node", "2", "--critic_num_gpus_per_node", "1"]
    flags += ["--ref_num_gpus_per_node", "2", "--reward_num_gpus_per_node", "1", "--colocate_actor_ref"]
    flags += ["--reward_pretrain", "rm", "--train_batch_size", "4", "--zero_stage", "3", "--bf16", "--enable_ema"]
    done = ppo(*flags, "--vllm_num_engines", "1", "--kl_target", "0.05", "--save_steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(step["sync_gap"] < 2e-2 for step in metrics(tmp_path / "out_run"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("policy", "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].shape == before[name].shape
    assert not torch.equal(after[name].float(), before[name].float())
