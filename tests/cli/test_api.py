"""The commands as functions of a program."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing

import pytest

import openrlhf
from openrlhf.config.groups import BatchConfig, CheckpointConfig, LoggingConfig, ModelConfig, SFTDataConfig
from openrlhf.errors import UsageError
from tests.cli.supervised import ROOT, assert_same_weights, demonstrations, environment, write_rows
from tests.helpers import tiny_folder


def test_importing_the_package_imports_nothing_else():
    program = (
        "import sys; before = set(sys.modules); import openrlhf\n"
        "own = {name for name in set(sys.modules) - before if name.startswith('openrlhf')}\n"
        "openrlhf.train_sft, openrlhf.SFTConfig\n"
        "print(own, {'torch', 'transformers', 'deepspeed', 'ray', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment(), cwd=ROOT
    )
    assert done.stdout.split("\n")[0] == "{'openrlhf'} set()", done.stderr


@pytest.mark.parametrize("name", openrlhf.__all__)
def test_every_name_is_there_and_typed(name):
    found = getattr(openrlhf, name)
    assert found.__name__ == name and found.__doc__
    if inspect.isfunction(found) and name != "configure":
        hints = typing.get_type_hints(found)
        assert list(hints) == ["config", "return"] and hints["return"].__name__ == "Path"


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="has no attribute 'train_sfd'"):
        _ = openrlhf.train_sfd


def test_a_configuration_by_names_and_one_by_groups_train_the_same_model(tmp_path):
    folder = tiny_folder(tmp_path / "policy")
    rows = write_rows(tmp_path / "rows.jsonl", demonstrations(8))
    flags = {"pretrain": folder, "dataset": rows, "input_key": "prompt", "output_key": "answer"}
    sizes = {"train_batch_size": 4, "micro_train_batch_size": 4}
    named = openrlhf.configure(
        openrlhf.SFTConfig, **flags, **sizes, save_path=tmp_path / "named", ckpt_path=tmp_path / "a", max_epochs=1
    )
    grouped = openrlhf.SFTConfig(
        model=ModelConfig(pretrain=folder),
        data=SFTDataConfig(dataset=rows, input_key="prompt", output_key="answer"),
        batch=BatchConfig(**sizes),
        checkpoint=CheckpointConfig(save_path=str(tmp_path / "grouped"), ckpt_path=str(tmp_path / "b")),
        logging=LoggingConfig(wandb_project="openrlhf_train_sft"),
    )
    paths = [openrlhf.train_sft(config) for config in (named, grouped)]
    assert paths == [tmp_path / "named", tmp_path / "grouped"]
    assert_same_weights(*paths)
    metrics = [json.loads(line) for line in (tmp_path / "named_run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if row["phase"] == "train"] == [1, 2]


ROUND = """
import gc, json, sys, torch, openrlhf
flags = json.loads(sys.argv[1])
answers = openrlhf.batch_inference(openrlhf.configure(openrlhf.BatchInferenceConfig, **flags["batch"]))
gc.unfreeze()
held = [kept for kept in gc.get_objects() if isinstance(kept, torch.nn.Module) and "vllm" in type(kept).__module__]
print("vllm" in sys.modules, len(held), torch.distributed.is_initialized())
print(openrlhf.train_sft(openrlhf.configure(openrlhf.SFTConfig, dataset=answers, **flags["sft"])))
"""


@pytest.mark.full
def test_a_training_gets_the_memory_of_the_engine_that_answered_before_it(tmp_path):
    folder = tiny_folder(tmp_path / "policy", hidden=128)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"input": f"What is {n}?"} for n in range(4)])
    batch = {"eval_task": "generate_vllm", "dataset": prompts, "output_path": tmp_path / "answers.jsonl"}
    sft = {"input_key": "input", "output_key": "output", "save_path": tmp_path / "sft", "ckpt_path": tmp_path / "c"}
    sft |= {"train_batch_size": 4, "micro_train_batch_size": 2}
    flags = {"batch": {"pretrain": folder, "max_new_tokens": 4, **batch}, "sft": {"pretrain": folder, **sft}}
    done = subprocess.run(
        [sys.executable, "-c", ROUND, json.dumps(flags, default=str)],
        capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "True 0 False" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == str(tmp_path / "sft") and (tmp_path / "sft/model.safetensors").exists()


def test_a_wrong_flag_is_named_when_it_is_set():
    with pytest.raises(UsageError, match="unknown flag --learning_rat: did you mean --learning_rate?"):
        openrlhf.configure(openrlhf.SFTConfig, learning_rat=1)
    with pytest.raises(UsageError, match="--zero_stage must be one of 0, 1, 2, 3, got '4'"):
        openrlhf.configure(openrlhf.SFTConfig, zero_stage=4)


def test_rules_across_flags_are_checked_when_a_configuration_is_used():
    with pytest.raises(UsageError) as caught:
        openrlhf.train_dpo(openrlhf.DPOConfig())
    assert [problem.split()[0] for problem in caught.value.problems] == ["--pretrain", "--dataset"]
    with pytest.raises(UsageError, match="--seed must be at least 0"):
        openrlhf.train_sft(openrlhf.SFTConfig(batch=BatchConfig(seed=-1)))


def test_values_have_the_types_of_their_flags():
    config = openrlhf.configure(
        openrlhf.DPOConfig, bf16=True, adam_betas=(0.8, 0.9), target_modules=["q_proj"], prompt_key=None, seed=7
    )
    assert config.model.bf16 is True and config.optim.adam_betas == (0.8, 0.9)
    assert config.lora.target_modules == ("q_proj",) and config.data.prompt_key is None and config.batch.seed == 7
