"""``batch_inference`` as a user starts it: both engines, reward models, ranks, kills, wrong flags."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from openrlhf.cli.batch_inference import infer, problems
from openrlhf.config.arguments import parse
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.errors import DataError, NumericError, UsageError
from tests.cli.supervised import ROOT, command, environment, on_two_ranks, run, write_rows
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import tiny_reward_model

PROMPTS = [f"How many {'very ' * (n % 5)}clips {n}?" for n in range(21)]
MEAN, STD = 0.01, 0.02


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict:
    """The models and data of all runs; the weights are large enough for ZeRO-3 to cut them."""
    folder = tmp_path_factory.mktemp("material")
    return {
        "policy": tiny_folder(folder / "policy", hidden=256, scale=0.03),
        "rm": tiny_reward_model(folder / "rm", mean=MEAN, std=STD),
        "prompts": write_rows(folder / "prompts.jsonl", [{"input": prompt} for prompt in PROMPTS]),
    }


def generation(material: dict, output: Path, **more) -> dict:
    """Return the flags of a run that answers every prompt three times in windows of eight prompts."""
    flags = {
        "eval_task": "generate",
        "pretrain": material["policy"],
        "dataset": material["prompts"],
        "output_path": output,
        "max_new_tokens": 10,
        "best_of_n": 3,
        "window_size": 8,
        "micro_batch_size": 6,
    }
    return {**flags, **more}


def rating(material: dict, answers: Path, output: Path, **more) -> dict:
    """Return the flags of a run that rates answers."""
    flags = {
        "eval_task": "rm",
        "pretrain": material["rm"],
        "dataset": answers,
        "output_path": output,
        "window_size": 16,
        "micro_batch_size": 4,
    }
    return {**flags, **more}


def here(flags: dict, *switches: str) -> list[dict]:
    """Do what the flags say in this process and return the lines of the output."""
    words = command("batch_inference", flags, switches)[3:]
    infer(parse(BatchInferenceConfig, words, "batch_inference", problems)[0])
    return lines(flags["output_path"])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def answered(material, tmp_path_factory) -> Path:
    """The output of the undisturbed run of :func:`generation`."""
    output = tmp_path_factory.mktemp("answered") / "answers.jsonl"
    here(generation(material, output))
    return output


def test_every_prompt_is_answered_n_times_in_the_order_of_the_prompts(answered):
    rows = lines(answered)
    assert [row["input"] for row in rows] == PROMPTS * 3
    assert [list(row) for row in rows] == [["input", "output"]] * 63
    assert len({row["output"] for row in rows}) > 55
    assert {path.name for path in answered.parent.iterdir()} == {"answers.jsonl", "answers.jsonl.log"}


@pytest.mark.full
def test_two_ranks_write_what_one_writes(material, answered, tmp_path):
    done = run(on_two_ranks(command("batch_inference", generation(material, tmp_path / "out.jsonl"))))
    assert (tmp_path / "out.jsonl").read_bytes() == answered.read_bytes()
    assert done.stdout.count("done: 63 lines in") == 1


@pytest.mark.full
@pytest.mark.parametrize("task", ["generate", "rm"])
def test_two_ranks_that_share_every_weight_write_what_one_writes(material, answered, tmp_path, task):
    if task == "generate":
        run(on_two_ranks(command("batch_inference", generation(material, tmp_path / "out.jsonl", zero_stage=3))))
        assert (tmp_path / "out.jsonl").read_bytes() == answered.read_bytes()
        return
    alone = here(rating(material, answered, tmp_path / "alone.jsonl"))
    for stage in (0, 3):
        flags = rating(material, answered, tmp_path / f"{stage}.jsonl", zero_stage=stage)
        run(on_two_ranks(command("batch_inference", flags)))
        for row, expected in zip(lines(flags["output_path"]), alone, strict=True):
            assert row == {**expected, "reward": pytest.approx(expected["reward"], abs=1e-4)}


def test_greedy_answers_are_those_of_transformers_and_of_vllm(material, tmp_path):
    flags = generation(material, tmp_path / "hf.jsonl", best_of_n=1, repetition_penalty=1.3)
    found = here(flags, "greedy_sampling")
    model = AutoModelForCausalLM.from_pretrained(material["policy"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(material["policy"])
    for row, prompt in zip(found, PROMPTS, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=10, do_sample=False, repetition_penalty=1.3)
        assert row == {"input": prompt, "output": tokenizer.decode(whole[0, ids.shape[1] :])}
    flags |= {"eval_task": "generate_vllm", "output_path": tmp_path / "vllm.jsonl"}
    run(command("batch_inference", flags, ("greedy_sampling",)))
    assert (tmp_path / "vllm.jsonl").read_bytes() == (tmp_path / "hf.jsonl").read_bytes()


def killed_once(words: list[str], output: Path, windows: int, later: float) -> None:
    """Kill a run ``later`` seconds after its partial file has ``windows`` more windows than before."""
    partial = output.with_name(f"{output.name}.partial")
    wanted = windows + max(1, count(partial))
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < end and count(partial) < wanted:
            time.sleep(0.002)
        time.sleep(later)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL, process.stdout.read().decode()


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_at_a_random_moment_ends_as_if_nothing_had_happened(material, tmp_path):
    _kill_and_compare(slowly(material, "generate", tmp_path), kills=1)


@pytest.mark.full
def test_a_run_that_is_asked_to_stop_says_how_to_go_on(material, tmp_path):
    flags = generation(material, tmp_path / "out.jsonl", window_size=1, max_new_tokens=60)
    words = command("batch_inference", flags)
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end and count(tmp_path / "out.jsonl.partial") < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in told
    assert f"the same command goes on behind what is in {tmp_path / 'out.jsonl.partial'}" in told
    assert len(here(flags)) == 3 * len(PROMPTS)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("task", "kills"), [("generate", 10), ("rm", 10), ("generate_vllm", 4)])
def test_a_run_killed_at_many_random_moments_ends_as_if_nothing_had_happened(material, tmp_path, task, kills):
    _kill_and_compare(slowly(material, task, tmp_path), kills)


def slowly(material: dict, task: str, folder: Path) -> dict:
    """Return the flags of a run of many windows, which lasts longer than it takes to kill it."""
    if task == "rm":
        asked = [{"input": PROMPTS[n % 21], "output": f" {n} clips"} for n in range(3000)]
        return rating(material, write_rows(folder / "a.jsonl", asked), folder / "out.jsonl", window_size=1)
    slow = {"window_size": 1, "max_new_tokens": 60, "best_of_n": 2}
    return generation(material, folder / "out.jsonl", eval_task=task, **slow)


def _kill_and_compare(flags: dict, kills: int) -> None:
    """One run after another dies, each at a moment of its own; the last one ends."""
    output, words = flags["output_path"], command("batch_inference", flags)
    finish = run if flags["eval_task"] == "generate_vllm" else lambda _: here(flags)
    finish(words)
    whole = output.read_bytes()
    output.unlink()
    draw = random.Random(kills)
    for _ in range(kills):
        killed_once(words, output, draw.randint(0, 1), draw.random() / 4)
    assert count(output.with_name("out.jsonl.partial")) and not output.exists()
    finish(words)
    assert output.read_bytes() == whole and whole.count(b"\n") in (2 * len(PROMPTS), 3000)


def test_slices_are_what_iter_says_and_sample_anew(material, tmp_path):
    slices = [
        here(generation(material, tmp_path / f"{number}.jsonl", iter=number, rollout_batch_size=12, best_of_n=1))
        for number in (0, 1)
    ]
    assert [[row["input"] for row in rows] for rows in slices] == [PROMPTS[:12], PROMPTS[12:]]
    with pytest.raises(UsageError, match="--iter 2: .* begins at row 24, but --dataset .* has 21 rows"):
        here(generation(material, tmp_path / "2.jsonl", iter=2, rollout_batch_size=12))


def test_a_conditional_prompt_is_read_whole_even_where_the_prompt_is_cut(material, tmp_path):
    flags = generation(material, tmp_path / "out.jsonl", best_of_n=1, max_samples=1)
    rows = here({**flags, "csft_prompt": " <rm_score>: 4.00"}, "enable_csft", "greedy_sampling")
    assert rows[0]["input"] == f"{PROMPTS[0]}<rm_score>: 4.00 "
    plain = here(
        {**flags, "dataset": write_rows(tmp_path / "p.jsonl", [{"input": rows[0]["input"]}])}, "greedy_sampling"
    )
    assert plain == rows


def test_a_chat_template_is_not_begun_twice(material, tmp_path):
    """A template that spells bos itself gives one bos, whatever the tokenizer would add."""
    from shutil import copytree

    folder = copytree(material["policy"], tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.save_pretrained(folder)
    flags = generation(material, tmp_path / "out.jsonl", pretrain=folder, best_of_n=1, max_samples=2)
    rows = here(flags, "apply_chat_template", "greedy_sampling")
    expected = f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert rows[0]["input"] == expected
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(expected, add_special_tokens=False).input_ids])
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert rows[0]["output"] == tokenizer.decode(whole[0, ids.shape[1] :])


def test_a_special_token_that_a_user_spells_is_told_of_where_the_file_would_make_it_one(material, tmp_path, capfd):
    prompts = write_rows(tmp_path / "p.jsonl", [{"input": "a<|im_end|>b"}, {"input": "a"}, {"input": "<|im_start|>"}])
    flags = generation(material, tmp_path / "out.jsonl", dataset=prompts, best_of_n=1)
    rows = here(flags, "apply_chat_template")
    told = "2 rows spell a special token: plain text here, but in"
    assert rows[0]["input"].count("<|im_end|>") == 2 and told in capfd.readouterr().out
    here(flags)
    assert "plain text here" not in capfd.readouterr().out


def rewards_of(material: dict, rows: list[dict]) -> list[float]:
    """Return the normalised reward of every answer by itself, its end token once."""
    model = AutoModelForSequenceClassification.from_pretrained(material["rm"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(material["rm"])
    found = []
    for row in rows:
        ids = tokenizer(row["input"]).input_ids + tokenizer(row["output"]).input_ids
        ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
        with torch.no_grad():
            found.append((float(model(input_ids=torch.tensor([ids])).logits[0, 0]) - MEAN) / STD)
    return found


def test_every_answer_is_rated_once_and_in_its_place(material, answered, tmp_path):
    asked = [*lines(answered)[:20], {"input": "Why?", "output": ""}, {"input": "Why?", "output": "A\n"}]
    answers = write_rows(tmp_path / "answers.jsonl", asked)
    found = here(rating(material, answers, tmp_path / "rated.jsonl"))
    assert [{"input": row["input"], "output": row["output"]} for row in found] == asked
    assert [list(row) for row in found] == [["input", "output", "reward"]] * 22
    stripped = [{**row, "output": row["output"].rstrip("\n")} for row in asked]
    assert [row["reward"] for row in found] == pytest.approx(rewards_of(material, stripped), abs=2e-4)
    assert len({round(row["reward"], 3) for row in found}) > 15


def test_what_is_too_long_to_rate_keeps_its_end_token(material, tmp_path):
    answers = write_rows(tmp_path / "answers.jsonl", [{"input": "a b c d", "output": " e f g h i j k"}])
    found = here(rating(material, answers, tmp_path / "rated.jsonl", max_len=6))
    tokenizer = AutoTokenizer.from_pretrained(material["rm"])
    kept = tokenizer.decode(tokenizer("a b c d e f g h i j k").input_ids[:5])
    expected = rewards_of(material, [{"input": kept, "output": tokenizer.eos_token}])
    assert [row["reward"] for row in found] == pytest.approx(expected, abs=2e-4)


def test_conversations_are_rated_by_their_last_message(material, tmp_path):
    messages = [{"role": "user", "content": "12 + 30?"}, {"role": "assistant", "content": "42"}]
    answers = write_rows(tmp_path / "answers.jsonl", [{"messages": messages}])
    found = here(rating(material, answers, tmp_path / "rated.jsonl"))
    assert found[0]["input"] == "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert found[0]["output"] == "42<|im_end|>"
    assert found[0]["reward"] == pytest.approx(rewards_of(material, found)[0], abs=2e-4)


@pytest.mark.parametrize("name", ["rs", "iter_dpo", "csft"])
def test_a_post_processor_reads_the_rewards_of_the_run(material, answered, tmp_path, name):
    rated = here(rating(material, answered, tmp_path / "rated.jsonl", post_processor="null"))
    found = here(rating(material, answered, tmp_path / "out.jsonl", post_processor=name))
    if name == "csft":
        assert [row["input"] for row in found] == [f"{r['input']} <rm_score>: {r['reward']:.2f} " for r in rated]
        return
    best = {prompt: max(r["reward"] for r in rated if r["input"] == prompt) for prompt in PROMPTS}
    worst = {prompt: min(r["reward"] for r in rated if r["input"] == prompt) for prompt in PROMPTS}
    if name == "rs":
        assert {row["input"]: row["reward"] for row in found} == best and len(found) == len(PROMPTS)
    else:
        assert {row["prompt"]: row["chosen_reward"] for row in found} == best
        assert {row["prompt"]: row["rejected_reward"] for row in found} == worst


@pytest.mark.parametrize("switches", [(), ("normalize_reward",)])
def test_conditional_rewards_are_told_with_the_range_to_ask_from(material, answered, tmp_path, switches):
    output = tmp_path / "out.jsonl"
    told = [row["reward"] for row in here(rating(material, answered, output, post_processor="csft"), *switches)]
    log = (tmp_path / "out.jsonl.log").read_text()
    assert f"told as {min(told):.2f} to {max(told):.2f}, so ask for one of these (--csft_prompt)" in log


def test_a_reward_that_is_no_number_is_an_error_that_names_the_row(material, answered, tmp_path):
    broken = tiny_reward_model(tmp_path / "rm", mean=0.0, std=0.0)
    answers = write_rows(tmp_path / "answers.jsonl", lines(answered)[:3])
    with pytest.raises(NumericError, match="no finite reward for row 0, 1, 2 of the data"):
        here(rating(material, answers, tmp_path / "out.jsonl", pretrain=broken))


def test_a_policy_is_not_taken_for_a_reward_model_nor_the_other_way_round(material, answered, tmp_path):
    with pytest.raises(DataError, match="there is no value head `value_head` in the weights"):
        here(rating(material, answered, tmp_path / "out.jsonl", pretrain=material["policy"]))
    with pytest.raises(DataError, match="this is a reward model or critic"):
        here(generation(material, tmp_path / "out.jsonl", pretrain=material["rm"]))


def test_a_prompt_that_fills_the_model_is_an_error_before_it_is_loaded(material, tmp_path):
    long = write_rows(tmp_path / "p.jsonl", [{"input": "a " * 600}])
    with pytest.raises(DataError, match="the model reads 512 in all .* lower --prompt_max_len below 512"):
        here(generation(material, tmp_path / "out.jsonl", dataset=long))


GOOD = "--eval_task rm --pretrain m --dataset d --output_path o"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--eval_task rate", "--eval_task rate is not known: write one of generate_vllm, generate, rm"),
        ("--post_processor best", "--post_processor best is not known: write one of rs, iter_dpo, csft, null"),
        ("--eval_task generate --post_processor rs", "--post_processor rs needs rewards: it goes with --eval_task rm"),
        ("--post_processor csft --reward_template {input}", "has no {reward}: it needs both"),
        ("--top_p 1.5", "--top_p must be at most 1"),
        ("--iter -1", "--iter must be at least 0"),
        ("--best_of_n 0", "--best_of_n must be at least 1"),
        ("--dataset a,b", "--dataset_probs has 1 values for the 2 data sets"),
        ("--input_template {}{}", "--input_template '{}{}' needs one {}"),
    ],
)
def test_wrong_flags_are_refused_at_once(words, says):
    with pytest.raises(UsageError) as caught:
        parse(BatchInferenceConfig, [*GOOD.split(), *words.split()], "batch_inference")
    assert len(caught.value.problems) == 1 and says in caught.value.problems[0]


def test_what_is_missing_is_named_together():
    with pytest.raises(UsageError) as caught:
        parse(BatchInferenceConfig, [], "batch_inference")
    names = [problem.split()[0] for problem in caught.value.problems]
    assert names == ["--eval_task", "--pretrain", "--output_path", "--dataset"]


def test_flags_of_another_task_are_told(capsys):
    words = [*GOOD.split(), "--best_of_n", "2", "--tp_size", "2", "--normalize_reward", "--input_template", "x"]
    parse(BatchInferenceConfig, words, "batch_inference")
    told = capsys.readouterr().err
    assert all(f"--{name} has no effect here" in told for name in ("best_of_n", "tp_size", "normalize_reward"))
    assert "--input_template 'x' has no {}" in told


def test_vllm_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [*GOOD.split(), "--eval_task", "generate_vllm"]
    with pytest.raises(UsageError, match="--eval_task generate_vllm is one process, not 2 ranks"):
        parse(BatchInferenceConfig, words, "batch_inference", problems)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(material, tmp_path):
    flags = generation(material, tmp_path / "out.jsonl", iter=1)
    done = run([*command("batch_inference", flags), "--dry_run"])
    assert "3 x answers of at most 10 tokens" in done.stdout and "to 21 rows of" in done.stdout
    assert "slice 1 of 2048 rows" in done.stdout and list(tmp_path.iterdir()) == []
