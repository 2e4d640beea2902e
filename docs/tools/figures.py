"""Draw the pictures of the documentation from run folders, so that they can be drawn again from runs of one's own.

    python docs/tools/figures.py estimators runs/estimators        -> docs/images/estimators.png
    python docs/tools/figures.py sft runs/quickstart/seed-0/sft_run -> docs/images/sft.png

    python docs/tools/figures.py iterative runs/iterative/seed-0     -> docs/images/iterative.png

``estimators`` takes the folder that `quickstart_estimators.sh` fills, with a folder for each seed, ``iterative`` one
seed of `quickstart_iterative.sh`; any other name is that of one run in the table below.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy
from matplotlib.figure import Figure

from openrlhf.trainer.report import COLOURS, STYLE, draw
from openrlhf.trainer.report_series import Panel, Series, read_series

IMAGES = Path(__file__).resolve().parent.parent / "images"
ANSWERS = 256  # of one rollout of quickstart_estimators.sh
PANELS = {
    "sft": {"Loss (nats a token)": ("gpt_loss", "eval gpt_loss"), "Learning rate": ("lr",)},
    "reward-model": {
        "Loss": ("loss", "eval loss"),
        "Reward": ("chosen_reward", "reject_reward"),
        "Pairs in the right order": ("acc", "eval acc_mean"),
    },
    "dpo": {
        "Loss": ("loss", "eval loss"),
        "Reward": ("chosen_reward", "reject_reward"),
        "Pairs in the right order": ("acc", "eval acc_mean"),
    },
    "kto": {"Loss": ("kto_loss", "eval loss"), "Reward": ("chosen_reward", "reject_reward"), "Drift": ("kl",)},
    "distillation": {
        "Divergence from the teacher (nats a token)": ("kl", "eval kl"),
        "Loss on the data": ("gpt_loss", "eval gpt_loss"),
    },
    "process-reward-model": {"Loss": ("prm_loss", "eval prm_loss"), "Steps judged right": ("acc", "eval acc")},
    "ppo": {
        "True score": ("true_score", "eval true_score_t1", "eval true_score_t0"),
        "Reward": ("reward", "eval reward_t1"),
        "KL from the reference": ("kl",),
    },
}


ITERATIVE = {
    "Rejection sampling": {"loss, nats a token": ("rejection", "gpt_loss")},
    "Iterative DPO: pairs in the right order": {"round 0": ("dpo_0", "acc"), "round 1": ("dpo_1", "acc")},
    "Conditional SFT": {"loss, nats a token": ("csft", "gpt_loss")},
}


def of_run(name: str, run: Path) -> Figure:
    """Return the picture of one run."""
    series = _series(run)
    return _row([Panel(title, [series[key] for key in keys if key in series]) for title, keys in PANELS[name].items()])


def of_iterative(seed: Path) -> Figure:
    """Return what every training of `quickstart_iterative.sh` learned."""
    return _row(
        [
            Panel(
                title, [_series(seed / f"{run}_run")[key]._replace(name=label) for label, (run, key) in lines.items()]
            )
            for title, lines in ITERATIVE.items()
        ]
    )


def _series(run: Path) -> dict[str, Series]:
    return {one.name: one for one in read_series(run / "metrics.jsonl")}


def _row(panels: list[Panel]) -> Figure:
    figure = Figure(figsize=(4.4 * len(panels), 3.2), facecolor="white")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(panel, axes)
    return figure


def of_estimators(folder: Path) -> Figure:
    """Return accuracy against answers seen: a line for each estimator and seed."""
    figure = Figure(figsize=(13, 4.6), facecolor="white")
    kinds = {"sampled at T=1": "eval_default_pass1", "greedy": "eval_default_pass1_t0"}
    runs = sorted(path for path in folder.glob("seed-*/*_run") if path.name != "sft_run")
    names = sorted({run.name.removesuffix("_run") for run in runs})
    colours = dict(zip(names, COLOURS))
    for axes, (title, key) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
        told = set()
        for run in runs:
            name = run.name.removesuffix("_run")
            if not run.with_name(f"{name}.done").is_file():
                continue
            found = _series(run)[f"eval {key.removeprefix('eval_')}"]
            label = None if name in told else name
            first = run.parent.name == "seed-0"
            style = {"linewidth": 1.8} if first else {"linewidth": 1, "linestyle": "--"}
            axes.plot([ANSWERS * step for step in found.steps], [100 * value for value in found.values],
                      color=colours[name], label=label, marker="o", markersize=3.5, **style)  # fmt: skip
            told.add(name)
        axes.set_yscale("function", functions=(_stretched, _accuracy))
        axes.set_yticks([30, 50, 70, 80, 90, 95, 98, 99, 99.5, 100])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"Exact answers to 2,048 held-out prompts, {title} (%)")
        axes.set_xlabel("answers seen")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="lower right")
    return figure


def _stretched(accuracy):
    """Return where an accuracy lies on an axis that shows the last percents as large as the first fifty."""
    return -numpy.log10(100.2 - numpy.minimum(accuracy, 100.0))


def _accuracy(stretched):
    return 100.2 - 10.0 ** (-stretched)


def main(name: str, folder: str) -> None:
    """Draw the picture ``name``."""
    with matplotlib.rc_context({**STYLE, "savefig.dpi": 100}):
        several = {"estimators": of_estimators, "iterative": of_iterative}
        figure = several[name](Path(folder)) if name in several else of_run(name, Path(folder))
        figure.savefig(IMAGES / f"{name}.png")
    print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
