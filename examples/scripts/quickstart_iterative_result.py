"""Gather what the policy learned from its own answers, write result.json and print the table.

python examples/scripts/quickstart_iterative_result.py RUN_DIR --seed 0 --result runs/iterative/result.json
"""

from __future__ import annotations

import json
from pathlib import Path

from quickstart_figures import metrics, seconds, tell

STAGES = (
    *("task", "sft", "reward_model", "answers_0", "pairs_0", "dpo_0", "answers_1", "pairs_1", "dpo_1"),
    *("best", "rejection", "rewarded", "csft", "csft_answers"),
)
TRAINED = ("rejection", "dpo_0", "dpo_1", "csft")
END_OF_TURN = "<|im_end|>"
MEASURED = {
    "sft": "the supervised policy",
    "rejection": "rejection sampling",
    "dpo_0": "iterative DPO, round 0",
    "dpo_1": "iterative DPO, round 1",
    "csft_1.00": "conditional SFT, asked for 1.00",
    "csft_-1.00": "conditional SFT, asked for -1.00",
    "csft_5.00": "conditional SFT, asked for 5.00",
}


def figures(out: Path, seed: int) -> dict:
    """Return everything that result.json holds: accuracy on held-out prompts, optimizer steps and seconds by stage."""
    labels = [row["label"] for row in rows(out / "task/prompts_eval.jsonl")]
    answers = [row["output"].removesuffix(END_OF_TURN) for row in rows(out / "csft_answers.jsonl")]
    return {
        "seed": seed,
        "measured": {name: json.loads((out / f"{name}.json").read_text()) for name in MEASURED},
        "greedy_through_batch_inference": sum(map(str.__eq__, answers, labels)) / len(labels),
        "steps": {name: metrics(out / f"{name}_run", "train")[-1]["step"] for name in TRAINED},
        "seconds": seconds(out, STAGES),
    }


def rows(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(result: dict) -> str:
    """Return the figures in lines that a person reads: greedy and sampled accuracy, and what was gained."""
    before = result["measured"]["sft"]
    lines = [
        f"exact answers to {before['rows']} held-out prompts, seed {result['seed']}, +- half of a 95 % interval",
        f"{'':34}{'greedy':25}sampled (T=1)",
    ]
    for name, what in MEASURED.items():
        found = result["measured"][name]
        columns = [
            f"{share:6.1%} +- {100 * half:3.1f}  ({100 * (share - before[kind][0]):+5.1f})   "
            for kind, (share, half) in ((kind, found[kind]) for kind in ("greedy", "sampled"))
        ]
        lines.append(f"  {what:32}{''.join(columns)}".rstrip())
    asked = result["greedy_through_batch_inference"]
    return "\n".join(
        [
            *lines,
            f"greedy, asked for 1.00 with batch_inference --enable_csft: {asked:.1%}",
            f"seconds: {', '.join(f'{name} {count}' for name, count in result['seconds'].items())}",
        ]
    )


if __name__ == "__main__":
    tell(__doc__, figures, table)
