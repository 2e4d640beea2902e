"""Gather the figures of the quickstart's family, write result.json and print what was learned.

python examples/scripts/quickstart_family_result.py RUN_DIR --seed 0 --result runs/family/result.json
"""

from __future__ import annotations

import json
from pathlib import Path

from quickstart_figures import metrics, seconds, tell

STAGES = ("task", "sft", "family_task", "dpo", "kto", "prm", "teacher", "kd")
TRAINED = ("dpo", "kto", "prm", "teacher", "kd")
MEASURED = ("dpo", "kto_pairs", "kto", "kd_before", "kd_after", "prm_before", "prm")


def figures(out: Path, seed: int) -> dict:
    """Return everything that result.json holds: what was measured of held-out rows, steps and seconds by stage."""
    return {
        "seed": seed,
        "measured": {name: json.loads((out / f"{name}.json").read_text()) for name in MEASURED},
        "steps": {name: metrics(out / f"{name}_run", "train")[-1]["step"] for name in TRAINED},
        "seconds": seconds(out, STAGES),
    }


def percent(share: list[float]) -> str:
    """Return a share with its interval."""
    return f"{share[0]:.1%} +- {100 * share[1]:.1f}"


def table(result: dict) -> str:
    """Return the figures in lines that a person reads."""
    said, steps = result["measured"], result["steps"]
    before, after = (said[f"kd_{when}"]["divergence"] for when in ("before", "after"))
    rows = {
        "dpo": f"{percent(said['dpo']['reward_accuracy'])} of {said['dpo']['rows']} pairs; "
        f"log-probs alone {percent(said['dpo']['log_prob_accuracy_of_reference'])} before, "
        f"{percent(said['dpo']['log_prob_accuracy'])} after",
        "kto": f"{percent(said['kto_pairs']['reward_accuracy'])} of the same pairs; "
        f"{percent(said['kto']['right_side'])} of answers on their side of the reference point",
        "kd": f"divergence from the teacher {before:.4f} before, {after:.4f} after ({after / before - 1:+.0%})",
        "prm": f"{percent(said['prm']['accuracy'])} of {said['prm']['steps']} steps; "
        f"before {percent(said['prm_before']['accuracy'])}, commoner label {said['prm']['commoner_label']:.1%}",
    }
    lines = [f"  {name:4} {steps[name]:5} steps {result['seconds'][name]:4} s   {text}" for name, text in rows.items()]
    return "\n".join([f"held-out rows, seed {result['seed']}, +- half of a 95 % interval", *lines])


if __name__ == "__main__":
    tell(__doc__, figures, table)
