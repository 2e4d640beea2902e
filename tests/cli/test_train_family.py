"""DPO, KTO, distillation and process reward models as a person runs them: they learn, and what they write loads."""

import json

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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"))


def trained(program, folder, base, rows, evaluation, *switches, **flags):
    """Run a command to its end and return its train and evaluation metrics; nothing stands on standard error."""
    data = {"dataset": write_rows(folder / "train.jsonl", rows)}
    data["eval_dataset"] = write_rows(folder / "eval.jsonl", evaluation)
    places = {"save_path": folder / "model", "ckpt_path": folder / "ckpt"}
    done = run(command(program, {"pretrain": base, **data, **SHAPE, **places, **flags}, switches))
    assert done.stderr == ""
    assert str(folder / "model") in done.stdout.splitlines()[-1]
    return metrics_of(folder / "model_run"), metrics_of(folder / "model_run", "eval")


def log_prob(folder, text, answer):
    """Return the log-prob of an answer and the end after a prompt, with nothing of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    ids = [*prompt, *tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))


def test_dpo_prefers_the_chosen_answers_of_other_prompts(base, tmp_path):
    held_out = pairs(5, first=100)
    train, evaluation = trained("train_dpo", tmp_path, base, pairs(40), held_out, prompt_key="prompt")
    assert {"loss", "acc", "chosen_reward", "reject_reward", "lr", "loss_mean", "acc_mean"} <= set(train[0])
    assert train[0]["acc"] == 0 and train[0]["chosen_reward"] == 0, "before the first step policy and reference agree"
    assert train[-1]["loss"] < 0.7 * train[0]["loss"] and train[-1]["chosen_reward"] > train[-1]["reject_reward"]
    now, before = (
        [[log_prob(folder, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in held_out]
        for folder in (tmp_path / "model", base)
    )
    z = torch.tensor(now).diff() - torch.tensor(before).diff()
    assert evaluation[-1]["acc_mean"] == 1.0 and (z < 0).all()
    assert evaluation[-1]["eval_loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(-0.1 * z).mean().item(), rel=1e-3
    )


def test_kto_makes_desirable_answers_likelier(base, tmp_path):
    flags = {"input_key": "prompt", "output_key": "answer", "beta": 0.1}
    train, evaluation = trained("train_kto", tmp_path, base, answers(20), answers(5, first=100), **flags)
    assert {"kto_loss", "kl", "lr", "loss_mean"} <= set(train[0])
    assert train[0]["kto_loss"] == 0.5, "before the first step policy and reference agree"
    assert train[-1]["kto_loss"] < 0.4 and train[-1]["chosen_reward"] > train[-1]["reject_reward"]
    assert set(evaluation[-1]) >= {"eval_loss", "chosen_reward", "reject_reward"}


def test_distillation_comes_nearer_to_the_teacher(base, tmp_path):
    flags = {"input_key": "prompt", "output_key": "answer", "kd_coef": 0.8}
    teacher = tiny_folder(tmp_path / "teacher", hidden=48, seed=1)
    rows, held_out = demonstrations(40), demonstrations(5, first=100)
    train, evaluation = trained("train_kd", tmp_path, base, rows, held_out, teacher_model=teacher, **flags)
    assert {"gpt_loss", "distil_loss", "kl", "lr", "loss_mean"} <= set(train[0])
    assert evaluation[-1]["eval kl"] < 0.9 * train[0]["kl"]
    mixed = 0.2 * evaluation[-1]["eval gpt_loss"] + 0.8 * evaluation[-1]["eval distil_loss"]
    assert evaluation[-1]["eval_loss"] == pytest.approx(mixed, rel=1e-6)


def test_a_process_reward_model_judges_the_steps_of_other_answers(base, tmp_path):
    flags = {"placeholder_token": "*", "reward_tokens": "+|-", "max_epochs": 4, "learning_rate": 1e-2}
    train, evaluation = trained("train_prm", tmp_path, base, steps(60), steps(7, first=100), **flags)
    assert {"prm_loss", "acc", "lr", "loss_mean", "acc_mean"} <= set(train[0])
    assert evaluation[-1]["eval acc"] > 0.9 and train[-1]["prm_loss"] < 0.5 * train[0]["prm_loss"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
