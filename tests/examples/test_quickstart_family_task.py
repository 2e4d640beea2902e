"""What the quickstart's other commands learn from is what the scripts say it is."""

import json
import random


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def small_task(script, folder, seed=0):
    """Write a small task and what the family adds to it, without the models."""
    folder.mkdir()
    sizes = {"demonstrations": 300, "pairs": 200, "prompts": 10, "held_out": 50}
    script("quickstart_task").write_data(folder, seed, **sizes)
    script("quickstart_family_task").write_data(folder, seed)
    return {path.stem: rows_of(path) for path in sorted(folder.glob("*.jsonl"))}


def labels_by_the_rule(prompt, steps):
    """Judge steps again: right is the smallest of the given letters that no step has taken yet."""
    given = set(prompt.split(": ")[1].split())
    return ["+" if step == min(given - set(steps[:index])) else "-" for index, step in enumerate(steps)]


def test_a_step_is_right_where_it_takes_the_smallest_letter_that_is_left(script, tmp_path):
    rows = small_task(script, tmp_path / "task")["steps_train"]
    labels = [label for row in rows for label in row["labels"]]
    assert all(row["labels"] == labels_by_the_rule(row["prompt"], row["completions"]) for row in rows)
    assert all(len(row["completions"]) == len(row["prompt"].split(": ")[1].split()) for row in rows)
    assert 0.3 < labels.count("-") / len(labels) < 0.4


def test_all_three_kinds_of_wrong_steps_occur(script):
    draw, kinds = random.Random(0), set()
    for _ in range(200):
        steps, labels = script("quickstart_family_task").solution(list("dbca"), draw)
        for index, (step, label) in enumerate(zip(steps, labels, strict=True)):
            if label == "-":
                kinds.add("again" if step in steps[:index] else "too early" if step in "abcd" else "not given")
    assert kinds == {"again", "too early", "not given"}


def test_an_answer_is_desirable_where_it_was_the_chosen_one(script, tmp_path):
    task = small_task(script, tmp_path / "task")
    assert len(task["answers_train"]) == len(task["pairs_train"])
    for pair, answer in zip(task["pairs_train"], task["answers_train"], strict=True):
        side = "chosen" if answer["label"] else "rejected"
        assert (answer["prompt"], answer["completion"]) == (pair["prompt"], pair[side])
    assert {row["label"] for row in task["answers_train"]} == {True, False}
    assert [row["completion"] for row in task["answers_eval"]] == [
        pair[side] for pair in task["pairs_eval"] for side in ("chosen", "rejected")
    ]


def test_no_held_out_prompt_is_trained_on_and_a_seed_writes_the_same_files(script, tmp_path):
    task = small_task(script, tmp_path / "task")
    held_out = {row["prompt"] for row in task["pairs_eval"]}
    for name in ("answers", "steps"):
        assert {row["prompt"] for row in task[f"{name}_eval"]} == held_out
        assert not held_out & {row["prompt"] for row in task[f"{name}_train"]}
    assert small_task(script, tmp_path / "again") == task
    assert small_task(script, tmp_path / "other", seed=1)["steps_train"] != task["steps_train"]
