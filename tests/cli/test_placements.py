"""Every way to place the models trains the same policy: three steps each, with a real Ray, DeepSpeed and vLLM.

One of the runs shows also what a run leaves behind, and is cut and taken up again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.cli.resuming import cut, differences, places, remember
from tests.cli.test_train_ppo_ray import data, metrics, ppo
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import reward_file, tiny_reward_model

LOSSES = ("policy_loss", "critic_loss", "reward", "kl", "actor_grad_norm", "critic_grad_norm")
COLOCATED = ["--colocate_actor_ref", "--colocate_critic_reward"]
TENSOR_PARALLEL = ["--vllm_tensor_parallel_size", "2"]


def material(folder: Path, devices: int = 1, engines: int = 1) -> list[str]:
    """Write models and data to ``folder`` and return the flags of a run there with ``devices`` ranks a role."""
    tiny_reward_model(folder / "rm")
    shared = data(folder)
    tiny_folder(folder / "policy", hidden=64, num_key_value_heads=2)  # which two devices can share
    ranks = [f"--{role}_num_gpus_per_node={devices}" for role in ("actor", "critic", "ref", "reward")]
    run = [*shared, *ranks, "--reward_pretrain", "rm", "--train_batch_size", "4", "--max_samples", "12"]
    run += ["--rollout_batch_size", "4", "--micro_rollout_batch_size", "2", "--micro_train_batch_size", "1"]
    return [*run, "--vllm_num_engines", str(engines), "--init_kl_coef", "0.05", "--save_path", "model"]


def three_steps(folder: Path, flags: list[str]) -> list[dict]:
    """Return the metrics of three rollout steps."""
    done = ppo(*flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    steps = metrics(folder / "model_run")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["sync_gap_max"] < 1e-5 for step in steps)
    return steps


def same_losses(one: list[dict], other: list[dict]) -> None:
    for first, second in zip(one, other, strict=True):
        for name in LOSSES:
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5), (name, first["step"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[str], Path]:
    """The flags and the folder of a run with actor beside reference, critic beside reward model, the engine alone."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("pairwise")
    flags = [*material(folder), *COLOCATED, "--save_value_network", "--vllm_sync_backend", "gloo"]
    flags += ["--eval_dataset", "prompts.jsonl", "--eval_reward_func", reward_file(folder)]
    three_steps(folder, [*flags, *places(folder)])
    return flags, folder


@pytest.fixture(scope="module")
def pairwise(whole) -> list[dict]:
    """The metrics of that run."""
    return metrics(whole[1] / "model_run")


@pytest.mark.timeout(300)
def test_a_run_learns_evaluates_reports_and_saves_what_transformers_loads(whole, pairwise):
    _, folder = whole
    assert pairwise[1]["kl"] != 0.0
    assert [line["step"] for line in metrics(folder / "model_run", "eval")] == [0, 3]
    assert (folder / "model_run" / "report.html").is_file()
    AutoModelForCausalLM.from_pretrained(folder / "model")
    AutoModelForSequenceClassification.from_pretrained(folder / "model_critic")


@pytest.mark.timeout(300)
def test_a_run_that_was_cut_is_the_whole_run_bit_for_bit(whole, tmp_path):
    flags, folder = whole
    cut(folder, tmp_path, 2)
    remember(tmp_path)
    done = ppo(*flags, *places(tmp_path), "--load_checkpoint", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert differences(folder, tmp_path, 2, steps=3) == []


@pytest.mark.timeout(300)
def test_all_models_and_the_engine_on_one_device_learn_what_they_learn_on_three(pairwise, tmp_path):
    asleep = ["--vllm_enable_sleep", "--deepspeed_enable_sleep"]
    same_losses(pairwise, three_steps(tmp_path, [*material(tmp_path), "--colocate_all_models", *asleep]))


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("flags", "devices", "engines"),
    [
        ([], 1, 1),
        (["--colocate_actor_ref"], 1, 1),
        (["--colocate_critic_reward"], 1, 1),
        (["--colocate_all_models", "--colocate_critic_reward"], 1, 1),
        (COLOCATED, 2, 2),
        (["--colocate_all_models"], 2, 2),
        ([*COLOCATED, *TENSOR_PARALLEL], 1, 1),
        (["--colocate_all_models", *TENSOR_PARALLEL], 2, 1),
    ],
)
def test_every_placement_learns_the_same(pairwise, tmp_path, flags, devices, engines):
    same_losses(pairwise, three_steps(tmp_path, [*material(tmp_path, devices, engines), *flags]))
