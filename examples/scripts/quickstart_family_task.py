"""What the other supervised commands learn from on the quickstart's task; reads what ``quickstart_task.py`` wrote.

    python examples/scripts/quickstart_family_task.py TASK_DIR [--seed 0]

adds to TASK_DIR:

    teacher/            a Qwen2 four times as large as model/, with random weights and the same tokenizer
    answers_train.jsonl prompt, completion, label   one answer of each pair, true where it is the chosen one (KTO)
    answers_eval.jsonl  prompt, completion, label   both answers of each held-out pair
    steps_train.jsonl   prompt, completions, labels letters taken one at a time; every step is judged (PRM)
    steps_eval.jsonl    prompt, completions, labels of held-out prompts

A step takes one letter and is right ("+") where that is the smallest letter still left, else wrong ("-"). What is left
are the given letters without those taken before, rightly or not, so one wrong step does not make the next ones wrong.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from quickstart_task import LETTERS, prompt_of, write_model

WRONG_STEPS = 0.35
RIGHT, WRONG = "+", "-"


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def letters_of(prompt: str) -> list[str]:
    """Return the letters that a prompt asks to sort."""
    return prompt.removeprefix(prompt_of([])).split()


def answers(pair: dict) -> list[dict]:
    """Return the two answers of a pair, each with its label: the desirable one first."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]


def next_step(left: list[str], taken: list[str], draw: random.Random) -> str:
    """Return the letter of the next step: mostly the smallest that is left."""
    if draw.random() >= WRONG_STEPS:
        return min(left)
    later = [letter for letter in left if letter != min(left)]
    elsewhere = [letter for letter in LETTERS if letter not in left and letter not in taken]
    kinds = [(kind, weight) for kind, weight in ((later, 70), (taken, 15), (elsewhere, 15)) if kind]
    ((kind, _),) = draw.choices(kinds, weights=[weight for _, weight in kinds])
    return draw.choice(kind)


def solution(letters: list[str], draw: random.Random) -> tuple[list[str], list[str]]:
    """Return the steps of a careless solution, as many as there are letters, and the label of each."""
    left, steps, labels = list(letters), [], []
    for _ in letters:
        step = next_step(left, steps, draw)
        labels.append(RIGHT if step == min(left) else WRONG)
        steps.append(step)
        if step in left:
            left.remove(step)
    return steps, labels


def step_row(prompt: str, draw: random.Random) -> dict:
    """Return a prompt with a solution in steps and their labels."""
    steps, labels = solution(letters_of(prompt), draw)
    return {"prompt": prompt, "completions": steps, "labels": labels}


def write_data(task: Path, seed: int) -> None:
    """Write the four data files."""
    draw = random.Random(seed)
    train, held_out = (read_rows(task / f"pairs_{split}.jsonl") for split in ("train", "eval"))
    write_rows(task / "answers_train.jsonl", (draw.choice(answers(pair)) for pair in train))
    write_rows(task / "answers_eval.jsonl", (row for pair in held_out for row in answers(pair)))
    for split in ("train", "eval"):
        prompts = (row["prompt"] for row in read_rows(task / f"sft_{split}.jsonl"))
        write_rows(task / f"steps_{split}.jsonl", (step_row(prompt, draw) for prompt in prompts))


def main() -> None:
    """Write the data and the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_data(args.task, args.seed)
    write_model(args.task / "teacher", args.seed, hidden=192, layers=4)


if __name__ == "__main__":
    main()
