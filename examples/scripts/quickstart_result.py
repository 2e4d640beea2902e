"""Gather the quickstart's figures from its run folders, write result.json and print what happened.

python examples/scripts/quickstart_result.py RUN_DIR --seed 0 --result runs/quickstart/result.json
"""

from __future__ import annotations

from pathlib import Path

from quickstart_figures import metrics, seconds, tell

STAGES = ("task", "sft", "reward_model", "ppo")


def figures(out: Path, seed: int) -> dict:
    """Return everything that result.json holds; fractions, and seconds by stage."""
    sft, reward_model, ppo = (metrics(out / f"{name}_run", "eval") for name in ("sft", "rm", "ppo"))
    before, after = ppo[0], ppo[-1]
    return {
        "seed": seed,
        "held_out_prompts": sum(1 for _ in (out / "task/prompts_eval.jsonl").open()),
        "exact_match_before": before["true_score_t1"],
        "exact_match_after": after["true_score_t1"],
        "greedy_before": before["true_score_t0"],
        "greedy_after": after["true_score_t0"],
        "t06_before": before["true_score_t0.6"],
        "t06_after": after["true_score_t0.6"],
        "rm_pair_accuracy": reward_model[-1]["acc_mean"],
        "rm_accuracy_on_sft_samples": before.get("reward_auc_t1"),
        "sft_eval_loss": [row["eval gpt_loss"] for row in sft],
        "seconds": seconds(out, STAGES),
        "report": str((out / "ppo_run/report.html").resolve()),
    }


def table(result: dict) -> str:
    """Return the figures in lines that a person reads."""
    told_apart = result["rm_accuracy_on_sft_samples"]
    samples = "no sample of the SFT policy is right" if told_apart is None else (
        f"tells a right sample of the SFT policy from a wrong one {told_apart:.1%} of the time"
    )  # fmt: skip
    return (
        f"exact answers on {result['held_out_prompts']} held-out prompts, seed {result['seed']}\n"
        f"                     after SFT   after PPO\n"
        f"  sampled (T=1)        {result['exact_match_before']:6.1%}      {result['exact_match_after']:6.1%}\n"
        f"  sampled (T=0.6)      {result['t06_before']:6.1%}      {result['t06_after']:6.1%}\n"
        f"  greedy               {result['greedy_before']:6.1%}      {result['greedy_after']:6.1%}\n"
        f"reward model: {result['rm_pair_accuracy']:.1%} of held-out pairs; {samples}\n"
        f"seconds: {', '.join(f'{name} {count}' for name, count in result['seconds'].items())}\n"
        f"report:  {result['report']}"
    )


if __name__ == "__main__":
    tell(__doc__, figures, table)
