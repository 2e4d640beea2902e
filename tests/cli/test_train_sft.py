"""``train_sft`` as a person runs it: on one rank, on two under DeepSpeed's launcher, and killed in the middle."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.supervised import (
    ROOT,
    assert_same_weights,
    command,
    demonstrations,
    environment,
    metrics_of,
    on_two_ranks,
    run,
    run_and_kill,
    without_speed,
    write_rows,
)
from tests.helpers import tiny_folder

STEPS = 20


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """The flags of a small run: 2 epochs of 10 steps, the last of each short."""
    folder = tmp_path_factory.mktemp("sft")
    return {
        "pretrain": tiny_folder(folder / "base"),
        "dataset": write_rows(folder / "train.jsonl", demonstrations(78)),
        "eval_dataset": write_rows(folder / "eval.jsonl", demonstrations(9, first=100)),
        "eval_split": "train",
        "input_key": "prompt",
        "output_key": "answer",
        "max_len": 64,
        "learning_rate": 3e-3,
        "train_batch_size": 8,
        "micro_train_batch_size": 3,
        "max_epochs": 2,
    }


def places(folder: Path) -> dict:
    return {"save_path": folder / "model", "ckpt_path": folder / "ckpt", "save_steps": 3}


@pytest.fixture(scope="module")
def one_rank(material, tmp_path_factory):
    """A whole run on one rank, and what it printed."""
    folder = tmp_path_factory.mktemp("one_rank")
    done = run(command("train_sft", {**material, **places(folder)}))
    return folder, done


def test_the_loss_goes_down_and_each_step_stands_once(one_rank):
    folder, _ = one_rank
    rows = metrics_of(folder / "model_run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["gpt_loss"] < 0.8 * rows[0]["gpt_loss"]
    assert {"gpt_loss", "loss_mean", "lr", "grad_norm", "tokens_per_second", "epoch"} <= set(rows[0])
    assert [row["epoch"] for row in rows] == [1] * 10 + [2] * 10


def test_evaluation_comes_once_an_epoch(one_rank):
    folder, _ = one_rank
    rows = metrics_of(folder / "model_run", "eval")
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[1]["eval gpt_loss"] < rows[0]["eval gpt_loss"]


def test_the_terminal_has_our_lines_only(one_rank):
    folder, done = one_rank
    lines = done.stdout.splitlines()
    assert lines[0].startswith("run ")
    assert any("78 rows to train, 9 to evaluate" in line for line in lines)
    assert any("3 of 78 rows as the model reads them, what is trained between" in line for line in lines)
    assert any("10 steps an epoch, 20 steps in 2 epochs" in line for line in lines)
    assert any(line.startswith("step 20/20") for line in lines)
    assert str(folder / "model") in lines[-1]
    assert done.stderr == ""
    assert (folder / "model_run" / "report.html").is_file()


def test_the_folder_loads_with_transformers_and_gives_the_logged_loss(one_rank, material):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = one_rank
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total, count = 0.0, 0
    for row in demonstrations(9, first=100):
        prompt = tokenizer.encode(f"User: {row['prompt']}\nAssistant: ", add_special_tokens=False)
        answer = [*tokenizer.encode(row["answer"], add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(log_probs[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))
        count += len(answer)
    [*_, last] = metrics_of(folder / "model_run", "eval")
    assert last["eval gpt_loss"] == pytest.approx(total / count, rel=1e-4)


def test_killed_and_taken_up_again_the_run_is_the_same_bit_for_bit(one_rank, material, tmp_path):
    whole, _ = one_rank
    flags = {**material, **places(tmp_path)}
    before = run_and_kill(command("train_sft", flags), tmp_path / "model_run" / "metrics.jsonl", at_step=8)
    saved = max(int(path.name.removeprefix("global_step")) for path in (tmp_path / "ckpt").glob("global_step*[0-9]"))
    done = run(command("train_sft", flags, ("load_checkpoint",)))
    assert f"resuming from {tmp_path / 'ckpt'}/global_step{saved}" in done.stdout.splitlines()
    assert_same_weights(tmp_path / "model", whole / "model")
    for phase in ("train", "eval"):
        resumed, straight = metrics_of(tmp_path / "model_run", phase), metrics_of(whole / "model_run", phase)
        assert without_speed(resumed) == without_speed(straight)
    # The clock is in every line: lines that were written again would differ from those the killed run left.
    kept = [line for line in before.splitlines() if b'"step": ' in line and json.loads(line)["step"] <= saved]
    after = (tmp_path / "model_run" / "metrics.jsonl").read_bytes().splitlines()
    assert saved >= 6
    assert after[: len(kept)] == kept


def test_two_ranks_under_the_launcher_follow_the_run_of_one(one_rank, material, tmp_path):
    whole, _ = one_rank
    flags = {**material, "save_path": tmp_path / "model", "ckpt_path": tmp_path / "ckpt"}
    run(on_two_ranks(command("train_sft", flags, ("gradient_checkpointing",))))
    one, two = metrics_of(whole / "model_run"), metrics_of(tmp_path / "model_run")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["gpt_loss"] for row in two] == pytest.approx([row["gpt_loss"] for row in one], rel=1e-3)
    assert (tmp_path / "model_run" / "log.rank1.txt").is_file()


def test_the_file_itself_can_be_run(material):
    words = command("train_sft", material, ("dry_run",))
    done = run([words[0], str(ROOT / "openrlhf" / "cli" / "train_sft.py"), *words[3:]])
    assert "78" in done.stdout or "8" in done.stdout


def test_going_on_with_another_learning_rate_is_refused_in_one_message(one_rank, material, tmp_path):
    whole, _ = one_rank
    flags = {**material, **places(tmp_path), "ckpt_path": whole / "ckpt", "learning_rate": 1e-4}
    words = command("train_sft", flags, ("load_checkpoint",))
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --learning_rate 0.003 -> 0.0001 since global_step18 was written")
    assert len(done.stderr.splitlines()) == 1 and "--allow_config_change" in done.stderr
