"""DPO, KTO, distillation and process reward models as a person runs them: they learn, and what they write loads.

Two commands run at a time: most of it is the start of a program, on one core.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cli.supervised import answers, command, demonstrations, metrics_of, pairs, run, steps, write_rows
from tests.helpers import tiny_folder

SHAPE = {
    "eval_split": "train",
    "max_len": 64,
    "learning_rate": 3e-3,
    "train_batch_size": 8,
    "micro_train_batch_size": 3,
    "max_epochs": 2,
}
HELD_OUT = pairs(5, first=100)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"))


def trained(program, folder, base, rows, evaluation, **flags) -> tuple[Path, list[dict], list[dict]]:
    """Run a command to its end; return its folder, its train and its evaluation metrics.

    Nothing stands on standard error.
    """
    data = {"dataset": write_rows(folder / "train.jsonl", rows)}
    data["eval_dataset"] = write_rows(folder / "eval.jsonl", evaluation)
    places = {"save_path": folder / "model", "ckpt_path": folder / "ckpt"}
    done = run(command(program, {"pretrain": base, **data, **SHAPE, **places, **flags}))
    assert done.stderr == ""
    assert str(folder / "model") in done.stdout.splitlines()[-1]
    return folder, metrics_of(folder / "model_run"), metrics_of(folder / "model_run", "eval")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """What :func:`trained` gives of every command."""
    texts = {"input_key": "prompt", "output_key": "answer"}
    teacher = tiny_folder(tmp_path_factory.mktemp("teacher"), hidden=48, seed=1)
    steps_of = {"placeholder_token": "*", "reward_tokens": "+|-", "max_epochs": 4, "learning_rate": 1e-2}
    what = {
        "train_dpo": (pairs(40), HELD_OUT, {"prompt_key": "prompt"}),
        "train_kto": (answers(20), answers(5, first=100), {**texts, "beta": 0.1}),
        "train_kd": (
            demonstrations(40),
            demonstrations(5, first=100),
            {**texts, "kd_coef": 0.8, "teacher_model": teacher},
        ),
        "train_prm": (steps(60), steps(7, first=100), steps_of),
    }
    pool = ThreadPoolExecutor(max_workers=2)
    try:
        yield {
            program: pool.submit(trained, program, tmp_path_factory.mktemp(program), base, rows, evaluation, **flags)
            for program, (rows, evaluation, flags) in what.items()
        }
    finally:
        pool.shutdown(cancel_futures=True)


def log_prob(folder, text, answer):
    """Return the log-prob of an answer and the end after a prompt, with nothing of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    ids = [*prompt, *tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))


def test_dpo_prefers_the_chosen_answers_of_other_prompts(base, runs):
    place, train, evaluation = runs["train_dpo"].result()
    assert {"loss", "acc", "chosen_reward", "reject_reward", "lr", "loss_mean", "acc_mean"} <= set(train[0])
    assert train[0]["acc"] == 0 and train[0]["chosen_reward"] == 0, "before the first step policy and reference agree"
    assert train[-1]["loss"] < 0.7 * train[0]["loss"] and train[-1]["chosen_reward"] > train[-1]["reject_reward"]
    now, before = (
        [[log_prob(folder, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in HELD_OUT]
        for folder in (place / "model", base)
    )
    z = torch.tensor(now).diff() - torch.tensor(before).diff()
    assert evaluation[-1]["acc_mean"] == 1.0 and (z < 0).all()
    assert evaluation[-1]["eval_loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(-0.1 * z).mean().item(), rel=1e-3
    )


def test_kto_makes_desirable_answers_likelier(runs):
    _, train, evaluation = runs["train_kto"].result()
    assert {"kto_loss", "kl", "lr", "loss_mean"} <= set(train[0])
    assert train[0]["kto_loss"] == 0.5, "before the first step policy and reference agree"
    assert train[-1]["kto_loss"] < 0.4 and train[-1]["chosen_reward"] > train[-1]["reject_reward"]
    assert set(evaluation[-1]) >= {"eval_loss", "chosen_reward", "reject_reward"}


def test_distillation_comes_nearer_to_the_teacher(runs):
    _, train, evaluation = runs["train_kd"].result()
    assert {"gpt_loss", "distil_loss", "kl", "lr", "loss_mean"} <= set(train[0])
    assert evaluation[-1]["eval kl"] < 0.9 * train[0]["kl"]
    mixed = 0.2 * evaluation[-1]["eval gpt_loss"] + 0.8 * evaluation[-1]["eval distil_loss"]
    assert evaluation[-1]["eval_loss"] == pytest.approx(mixed, rel=1e-6)


def test_a_process_reward_model_judges_the_steps_of_other_answers(runs):
    folder, train, evaluation = runs["train_prm"].result()
    assert {"prm_loss", "acc", "lr", "loss_mean", "acc_mean"} <= set(train[0])
    assert evaluation[-1]["eval acc"] > 0.9 and train[-1]["prm_loss"] < 0.5 * train[0]["prm_loss"]
    assert json.loads((folder / "model" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
