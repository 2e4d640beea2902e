"""PPO in one program: the same run on one rank, on two that share every weight, and on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.cli.supervised import command, metrics_of, on_two_ranks, run, weights_of, write_rows
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import reward_file, tiny_reward_model

QUESTIONS = ["How many clips did Natalia sell?", "What is 12 + 30?", "Write a short story.", "What is the answer?"]
ONE_EACH = {f"{role}_num_gpus_per_node": 1 for role in ("actor", "critic", "ref", "reward")}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict:
    """The flags of the run: a model, a file and a critic judge 11 prompts in 2 rollout steps, the last one short.

    The weight matrices are large enough for ZeRO-3 to cut them. An optimizer step is a whole rollout: of several, each
    rank deals its own rows to them.
    """
    folder = tmp_path_factory.mktemp("material")
    rows = [{"input": f"{QUESTIONS[n % 4]} {n}", "label": str(n)} for n in range(11)]
    prompts = write_rows(folder / "prompts.jsonl", rows)
    return {
        "pretrain": tiny_folder(folder / "policy", hidden=256, scale=0.03),
        "reward_pretrain": tiny_reward_model(folder / "rm", mean=0.0, std=0.1),
        "remote_rm_url": reward_file(folder),
        "prompt_data": prompts,
        "prompt_max_len": 32,
        "generate_max_len": 6,
        "rollout_batch_size": 6,
        "micro_rollout_batch_size": 2,
        "train_batch_size": 6,
        "max_epochs": 2,
        "micro_train_batch_size": 2,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "lr_warmup_ratio": 0,
        "eval_dataset": prompts,
        "eval_split": "train",
        "eval_temperature": "1|0",
    }


def words(material: dict, folder: Path, program: str = "train_ppo", **more) -> list[str]:
    """Return the command line of a run that writes to ``folder``."""
    places = {"save_path": folder / "model", "ckpt_path": folder / "ckpt"}
    return command(program, {**material, **places, **more}, ("normalize_reward", "save_value_network"))


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory) -> Path:
    """The folder of the run on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run(words(material, folder))
    return folder


def samples(folder: Path) -> list[tuple[dict, list[str]]]:
    """Return the lines of ``samples.jsonl``, without the scores and the figures of tokens."""
    lines = [json.loads(line) for line in (folder / "model_run" / "samples.jsonl").read_text().splitlines()]
    words = [line.pop("tokens")["text"] for line in lines]
    scores = ("reward", "parts")
    exact = [{name: value for name, value in line.items() if name not in scores} for line in lines]
    return list(zip(exact, words, strict=True))


def assert_same_run(folder: Path, other: Path, within: float) -> None:
    """Fail unless two runs sampled the same answers and had the same metrics and weights within ``within``."""
    assert samples(folder) == samples(other)
    for phase in ("train", "eval"):
        pairs = list(zip(metrics_of(folder / "model_run", phase), metrics_of(other / "model_run", phase), strict=True))
        assert len(pairs) == 2
        for here, there in pairs:
            assert here.keys() == there.keys()
            for name in (name for name in here if name.partition("/")[0] != "time"):
                same = (
                    there[name] if isinstance(there[name], str) else pytest.approx(there[name], abs=within, rel=1e-4)
                )
                assert here[name] == same, name
    for model in ("model", "model_critic"):
        left, right = weights_of(folder / model), weights_of(other / model)
        assert left.keys() == right.keys()
        for name, weight in left.items():
            torch.testing.assert_close(weight, right[name], atol=10 * within, rtol=1e-3, msg=name)


def test_two_ranks_that_share_every_weight_do_what_one_does(material, alone, tmp_path):
    flags = {"zero_stage": 3, "save_steps": 1}
    done = run(on_two_ranks(words(material, tmp_path, **flags)))
    assert done.stdout.count("where    cpu, 2 ranks, on each: actor, ref, critic, reward, ZeRO-3") == 1
    assert_same_run(tmp_path, alone, 1e-5)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"global_step1", "global_step2"}
    whole = {path.name for path in (tmp_path / "ckpt" / "global_step2").iterdir()}
    assert {"actor", "critic", "rng", "manifest.json"} <= whole
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model_critic")


@pytest.mark.full
def test_ray_with_one_device_a_model_does_what_one_program_does(material, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    run(words(material, tmp_path, "train_ppo_ray", vllm_num_engines=0, **ONE_EACH))
    assert_same_run(tmp_path, alone, 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_way_to_share_the_weights_gives_the_same_run(material, alone, tmp_path, stage):
    run(on_two_ranks(words(material, tmp_path, zero_stage=stage)))
    assert_same_run(tmp_path, alone, 1e-5)


@pytest.mark.full
def test_actors_on_ray_that_share_every_weight_generate_too(material, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    places = {**ONE_EACH, "actor_num_gpus_per_node": 2}
    run(words(material, tmp_path, "train_ppo_ray", zero_stage=3, **places))
    assert_same_run(tmp_path, alone, 1e-5)


def test_a_dry_run_prints_who_holds_what_and_leaves_nothing_behind(material, tmp_path):
    done = run([*words(material, tmp_path), "--dry_run"])
    assert "1 rank, on each: actor, ref, critic, reward\n" in done.stdout
    assert "of at most 6 tokens, from the policy itself" in done.stdout
    assert list(tmp_path.iterdir()) == []
