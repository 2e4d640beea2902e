"""``train_rm`` as a person runs it: it learns, its folder scores the same elsewhere, and it survives a kill."""

import json

import pytest

from tests.cli.supervised import (
    assert_same_weights,
    command,
    metrics_of,
    on_two_ranks,
    pairs,
    run,
    run_and_kill,
    without_speed,
    write_rows,
)
from tests.helpers import tiny_folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """The flags of a small run: 2 epochs of 8 steps, with dropout, so that the random state matters."""
    folder = tmp_path_factory.mktemp("rm")
    return {
        "pretrain": tiny_folder(folder / "base", attention_dropout=0.1),
        "dataset": write_rows(folder / "train.jsonl", pairs(60)),
        "eval_dataset": write_rows(folder / "eval.jsonl", pairs(13, first=100)),
        "eval_split": "train",
        "prompt_key": "prompt",
        "max_len": 64,
        "learning_rate": 3e-3,
        "train_batch_size": 8,
        "micro_train_batch_size": 4,
        "max_epochs": 2,
        "save_steps": 3,
    }


def places(folder):
    return {"save_path": folder / "model", "ckpt_path": folder / "ckpt"}


@pytest.fixture(scope="module")
def one_rank(material, tmp_path_factory):
    """The folder of a whole run on one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    done = run(command("train_rm", {**material, **places(folder)}))
    assert done.stderr == ""
    return folder


def hf_rewards(folder, rows, **options):
    """Return the scores that transformers' own classifier gives to texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in rows:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(model(torch.tensor([ids])).logits.item())
    return torch.tensor(scores)


def test_the_pair_accuracy_rises_and_each_step_stands_once(one_rank):
    rows = metrics_of(one_rank / "model_run")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert {"loss", "acc", "chosen_reward", "reject_reward", "lr", "loss_mean", "acc_mean"} <= set(rows[0])
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    [*_, last] = metrics_of(one_rank / "model_run", "eval")
    assert last["acc_mean"] > 0.9


def test_the_folder_scores_the_same_as_a_plain_sequence_classifier(one_rank):
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in pairs(13, first=100)]
    scores = hf_rewards(one_rank / "model", texts)
    [*_, last] = metrics_of(one_rank / "model_run", "eval")
    config = json.loads((one_rank / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert (config["mean"], config["std"]) == (last["reward_mean"], last["reward_std"])
    assert scores.mean().item() == pytest.approx(config["mean"], abs=1e-4)
    assert scores.std().item() == pytest.approx(config["std"], abs=1e-4)
    assert (scores[:13] > scores[13:]).float().mean().item() == pytest.approx(last["acc_mean"])


@pytest.mark.full
def test_killed_and_taken_up_again_the_run_is_the_same_bit_for_bit(one_rank, material, tmp_path):
    flags = {**material, **places(tmp_path)}
    before = run_and_kill(command("train_rm", flags), tmp_path / "model_run" / "metrics.jsonl", at_step=5)
    saved = max(int(path.name.removeprefix("global_step")) for path in (tmp_path / "ckpt").glob("global_step*[0-9]"))
    run(command("train_rm", flags, ("load_checkpoint",)))
    assert_same_weights(tmp_path / "model", one_rank / "model")
    for phase in ("train", "eval"):
        resumed, straight = metrics_of(tmp_path / "model_run", phase), metrics_of(one_rank / "model_run", phase)
        assert without_speed(resumed) == without_speed(straight)
    # The clock is in every line: lines that were written again would differ from those the killed run left.
    after = (tmp_path / "model_run" / "metrics.jsonl").read_bytes().splitlines()
    assert after[:saved] == before.splitlines()[:saved]


@pytest.mark.full
def test_two_ranks_with_sharded_bf16_weights_and_another_head_name(material, tmp_path):
    own = {"zero_stage": 3, "value_head_prefix": "value_head", "loss": "logexp", "save_steps": -1}
    words = command("train_rm", {**material, **places(tmp_path), **own}, ("bf16", "gradient_checkpointing"))
    run(on_two_ranks(words))
    [*_, last] = metrics_of(tmp_path / "model_run", "eval")
    assert last["acc_mean"] > 0.8
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in pairs(13, first=100)]
    scores = hf_rewards(tmp_path / "model", texts, key_mapping={r"^value_head\.": "score."})
    assert scores.mean().item() == pytest.approx(last["reward_mean"], abs=0.1)
