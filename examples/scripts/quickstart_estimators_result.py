"""Gather what each estimator learned on the quickstart's task, write result.json and print the table.

python examples/scripts/quickstart_estimators_result.py RUN_DIR --seed 0 --result runs/estimators/result.json
"""

from __future__ import annotations

from pathlib import Path

from quickstart_figures import metrics, seconds, tell

ESTIMATORS = ("gae", "reinforce", "reinforce_baseline", "rloo", "group_norm", "dr_grpo", "gspo")
ANSWERS = 256  # of one rollout


def figures(out: Path, seed: int) -> dict:
    """Return everything that result.json holds: accuracies at every evaluation, seconds of training."""
    trained = tuple(name for name in ESTIMATORS if (out / f"{name}.done").is_file())
    return {
        "seed": seed,
        "held_out_prompts": sum(1 for _ in (out / "task/prompts_eval.jsonl").open()),
        "estimators": {name: curve(out / f"{name}_run") for name in trained},
        "seconds": seconds(out, ("task", "sft", *trained)),
    }


def curve(run: Path) -> dict:
    """Return what one run reached: answers seen, accuracy of samples at temperature 1 and of greedy answers."""
    evaluations = metrics(run, "eval")
    return {
        "answers": [ANSWERS * row["step"] for row in evaluations],
        "sampled": [row["eval_default_pass1"] for row in evaluations],
        "greedy": [row["eval_default_pass1_t0"] for row in evaluations],
        "seconds_in_steps": sum(row["time/step"] for row in metrics(run, "train")),
    }


def table(result: dict) -> str:
    """Return the figures in lines that a person reads: sampled / greedy accuracy by answers seen."""
    lines = [f"exact answers to {result['held_out_prompts']} held-out prompts, seed {result['seed']}: at T=1 / greedy"]
    for name, found in result["estimators"].items():
        if len(lines) == 1:
            lines.append(f"{'answers seen':20}" + "".join(f"{count:>17,}" for count in found["answers"]))
        pairs = zip(found["sampled"], found["greedy"], strict=True)
        reached = "".join(f"{f'{sampled:.1%} / {greedy:.1%}':>17}" for sampled, greedy in pairs)
        lines.append(f"{name:20}{reached}   {found['seconds_in_steps']:.0f} s in steps")
    return "\n".join(lines)


if __name__ == "__main__":
    tell(__doc__, figures, table)
