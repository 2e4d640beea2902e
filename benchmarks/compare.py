"""Ours and TRL on the same work, in turn, and the ratio of the medians: a table, a picture, a JSON file.

    python benchmarks/compare.py JOB --model MODEL_DIR --data DATA_DIR --peer-python PYTHON --out DIR

JOB is sft, rm, dpo, kto, rloo, sort_grpo or sort_rloo. MODEL_DIR is what ``model.py`` writes. DATA_DIR holds
gsm8k_train.jsonl (question, answer), for ``rm`` and ``dpo`` gsm8k_preference_train.jsonl (prompt, chosen, rejected),
for ``kto`` gsm8k_unpaired_train.jsonl (prompt, completion, label). For ``sort_grpo`` and ``sort_rloo`` MODEL_DIR is
the supervised policy of quickstart_estimators.sh and DATA_DIR its task: 20 rollouts of 32 prompts with 8 answers, two
optimizer steps each, in fp32, one thread. PYTHON belongs to the environment of the peer (see ``peer_trl.py``); ours
is the one that runs this file. The programs run one after the other, ``--rounds`` times each: A B A B. Leave the
machine alone meanwhile.

Both time training from the first step to the last, loading left out. But for ``sort_*`` ours trains bf16 weights with
an fp32 master copy, which is what ``--bf16`` does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = {"sft": 20, "rm": 20, "dpo": 20, "kto": 20, "rloo": 4}
SORT_PROMPTS, SORT_GROUPS, SORT_SAMPLES = 640, 32, 8
ROWS, PROMPTS, SAMPLES, NEW_TOKENS = 8, 16, 4, 128
PEERS = {
    "sft": {"TRL autocast": [], "TRL autocast, grouped by length": ["--group"]},
    "rm": {"TRL autocast": []},
    "dpo": {"TRL autocast": []},
    "kto": {"TRL autocast": []},
    "rloo": {"TRL autocast (GRPO, HF generate)": []},
    "sort_grpo": {"TRL fp32": ["--precision", "fp32", "--threads", "1"]},
    "sort_rloo": {"TRL fp32": ["--precision", "fp32", "--threads", "1"]},
}
OURS = "ours"
REWARD = '''"""Reward: the length of the answer modulo 7, which costs nothing."""


def reward_func(queries, prompts, labels):
    return [float(len(query[len(prompt):]) % 7) for query, prompt in zip(queries, prompts, strict=True)]
'''
Figures = dict[str, float]


def common(model: Path, work: Path) -> list[str]:
    """Return the flags that our three commands share."""
    return [
        *("--pretrain", str(model), "--apply_chat_template", "--bf16", "--zero_stage", "0", "--seed", "0"),
        *("--ckpt_path", str(work / "checkpoints"), "--save_path", str(work / "out")),
    ]


def head(source: Path, target: Path, count: int, change: Callable[[dict], dict] = dict) -> str:
    """Write the first rows of a jsonl file to another and return its name."""
    with source.open() as lines:
        target.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in islice(lines, count)))
    return str(target)


def sft_command(model: Path, data: Path, work: Path) -> list[str]:
    """Return our SFT on 20 steps of 8 rows."""
    file = head(data / "gsm8k_train.jsonl", work / "rows.jsonl", STEPS["sft"] * ROWS)
    return [
        *("openrlhf.cli.train_sft", *common(model, work), "--dataset", file, "--eval_dataset", file),
        *("--input_key", "question", "--output_key", "answer", "--max_len", "1024", "--max_epochs", "1"),
        *("--train_batch_size", str(ROWS), "--micro_train_batch_size", str(ROWS), "--learning_rate", "1e-4"),
    ]


def pairs_command(job: str, model: Path, data: Path, work: Path) -> list[str]:
    """Return our reward model or our DPO on 20 steps of 8 pairs."""
    file = head(data / "gsm8k_preference_train.jsonl", work / "pairs.jsonl", STEPS[job] * ROWS)
    return [
        *(f"openrlhf.cli.train_{job}", *common(model, work), "--dataset", file, "--eval_dataset", file),
        *("--prompt_key", "prompt", "--max_len", "1024", "--max_epochs", "1", "--learning_rate", "1e-4"),
        *("--train_batch_size", str(ROWS), "--micro_train_batch_size", str(ROWS)),
    ]


def kto_command(model: Path, data: Path, work: Path) -> list[str]:
    """Return our KTO on 20 steps of 8 answers."""
    file = head(data / "gsm8k_unpaired_train.jsonl", work / "answers.jsonl", STEPS["kto"] * ROWS)
    return [
        *("openrlhf.cli.train_kto", *common(model, work), "--dataset", file, "--eval_dataset", file),
        *("--input_key", "prompt", "--output_key", "completion", "--max_len", "1024", "--max_epochs", "1"),
        *("--train_batch_size", str(ROWS), "--micro_train_batch_size", str(ROWS), "--learning_rate", "1e-4"),
    ]


def rloo_command(model: Path, data: Path, work: Path) -> list[str]:
    """Return our PPO-Ray with RLOO: 4 steps of 16 prompts with 4 answers of 128 tokens at most."""

    def cut(row: dict) -> dict:
        return {"question": row["question"][:200]}

    file = head(data / "gsm8k_train.jsonl", work / "prompts.jsonl", STEPS["rloo"] * PROMPTS, cut)
    (work / "reward.py").write_text(REWARD)
    return [
        *("openrlhf.cli.train_ppo_ray", *common(model, work), "--prompt_data", file, "--input_key", "question"),
        *("--remote_rm_url", str(work / "reward.py"), "--advantage_estimator", "rloo", "--init_kl_coef", "0.01"),
        *("--rollout_batch_size", str(PROMPTS), "--n_samples_per_prompt", str(SAMPLES)),
        *("--train_batch_size", str(PROMPTS * SAMPLES), "--micro_train_batch_size", str(PROMPTS)),
        *("--micro_rollout_batch_size", str(PROMPTS), "--generate_max_len", str(NEW_TOKENS)),
        *("--prompt_max_len", "256", "--vllm_num_engines", "1", "--actor_num_gpus_per_node", "1"),
        *("--ref_num_gpus_per_node", "1"),
    ]


def sort_command(estimator: list[str], model: Path, data: Path, work: Path) -> list[str]:
    """Return our single-node PPO with groups of answers, which the policy itself generates."""
    file = head(data / "prompts_train.jsonl", work / "prompts.jsonl", SORT_PROMPTS)
    return [
        *("openrlhf.cli.train_ppo", "--pretrain", str(model), "--prompt_data", file, "--input_key", "prompt"),
        *("--remote_rm_url", str(HERE.parent / "examples/scripts/quickstart_reward.py"), "--label_key", "label"),
        *("--apply_chat_template", "--rollout_batch_size", str(SORT_GROUPS), "--prompt_max_len", "32"),
        *("--n_samples_per_prompt", str(SORT_SAMPLES), "--generate_max_len", "12", "--init_kl_coef", "0.001"),
        *("--micro_rollout_batch_size", str(SORT_GROUPS * SORT_SAMPLES), "--train_batch_size", "128"),
        *("--micro_train_batch_size", "128", "--actor_learning_rate", "3e-4", "--zero_stage", "0", "--seed", "0"),
        *("--ckpt_path", str(work / "checkpoints"), "--save_path", str(work / "out"), *estimator),
    ]


COMMANDS = {
    "sft": sft_command,
    "rm": partial(pairs_command, "rm"),
    "dpo": partial(pairs_command, "dpo"),
    "kto": kto_command,
    "rloo": rloo_command,
    "sort_grpo": partial(
        sort_command, ["--advantage_estimator", "group_norm", "--use_kl_loss", "--kl_estimator", "k3"]
    ),
    "sort_rloo": partial(sort_command, ["--advantage_estimator", "rloo"]),
}


def run_ours(job: str, model: Path, data: Path) -> Figures:
    """Run our command once and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        command = [sys.executable, "-m", *COMMANDS[job](model, data, work)]
        threads = {"OMP_NUM_THREADS": "1"} if job.startswith("sort_") else {}
        peak = run(command, work / "terminal.txt", cwd=HERE.parent, **threads)
        lines = [json.loads(line) for line in (work / "out_run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "train"]
    figures = FIGURES[job](steps)
    if "completions/s" in figures:
        return figures
    on_gpu = [step["memory/peak_gib"] * 1024 for step in steps if "memory/peak_gib" in step]
    return {**figures, "peak MiB": max(on_gpu, default=peak)}


def sft_figures(steps: list[dict]) -> Figures:
    """Return tokens a second."""
    tokens = sum(step["tokens_per_second"] * step["time/step"] for step in steps)
    return {"tokens/s": tokens / total(steps, "time/step")}


def row_figures(unit: str, steps: list[dict]) -> Figures:
    """Return pairs or rows a second."""
    return {f"{unit}/s": len(steps) * ROWS / total(steps, "time/step")}


def completion_figures(completions: int, steps: list[dict]) -> Figures:
    """Return completions a second, over all and in generation, of steps with ``completions`` each."""
    completions *= len(steps)
    return {
        "completions/s": completions / total(steps, "time/step"),
        "generated/s": completions / total(steps, "time/generate"),
    }


FIGURES = {
    "sft": sft_figures,
    "rm": partial(row_figures, "pairs"),
    "dpo": partial(row_figures, "pairs"),
    "kto": partial(row_figures, "rows"),
    "rloo": partial(completion_figures, PROMPTS * SAMPLES),
    "sort_grpo": partial(completion_figures, SORT_GROUPS * SORT_SAMPLES),
    "sort_rloo": partial(completion_figures, SORT_GROUPS * SORT_SAMPLES),
}


def total(steps: list[dict], name: str) -> float:
    """Return the sum of a metric over steps."""
    return sum(step[name] for step in steps)


def run(command: list[str], output: Path, cwd: Path, **environment: str) -> float:
    """Run ``command`` and return its largest resident memory in MiB (workers of Ray are not its children)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} ... failed:\n{output.read_text()[-3000:]}")
    return usage.ru_maxrss / 1024


def run_peer(job: str, model: Path, data: Path, python: str, flags: list[str]) -> Figures:
    """Run the peer once and return its figures."""
    command = [python, str(HERE / "peer_trl.py"), job, str(model), str(data), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(job: str, arguments: argparse.Namespace) -> dict[str, list[Figures]]:
    """Run all programs in turn, round after round; return the figures of each."""
    figures: dict[str, list[Figures]] = {OURS: [], **{name: [] for name in PEERS[job]}}
    for number in range(1, arguments.rounds + 1):
        for name, found in figures.items():
            if name == OURS:
                found.append(run_ours(job, arguments.model, arguments.data))
            else:
                flags = PEERS[job][name]
                found.append(run_peer(job, arguments.model, arguments.data, arguments.peer_python, flags))
            print(f"round {number}  {name}: {in_words(found[-1])}", flush=True)
            time.sleep(arguments.pause)
    return figures


def in_words(figures: Figures) -> str:
    """Return figures on one line."""
    return "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())


def medians(runs: list[Figures]) -> Figures:
    """Return the median of every figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def table(figures: dict[str, list[Figures]]) -> list[str]:
    """Return the medians and how many times ours is each."""
    ours = medians(figures[OURS])
    width = max(map(len, figures)) + len("ours / ")
    lines = ["".join([f"{'':{width}}", *(f"{name:>16}" for name in ours)])]
    for name, runs in figures.items():
        lines.append("".join([f"{name:{width}}", *(f"{value:>16,.4g}" for value in medians(runs).values())]))
    for name, runs in islice(figures.items(), 1, None):
        ratios = (ours[key] / value for key, value in medians(runs).items())
        lines.append("".join([f"{'ours / ' + name:{width}}", *(f"{ratio:>15.2f}x" for ratio in ratios)]))
    return lines


def picture(figures: dict[str, list[Figures]], path: Path) -> None:
    """Draw one panel a figure: a bar for the median, a dot for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names: Iterable[str] = figures[OURS][0]
    panels, axes = pyplot.subplots(1, len(list(names)), figsize=(4.2 * len(list(names)), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for place, (program, runs) in enumerate(figures.items()):
            axis.bar(place, medians(runs)[name], color="tab:blue" if program == OURS else "lightgray")
            axis.plot([place] * len(runs), [run[name] for run in runs], "k.", markersize=5)
        axis.set_xticks(range(len(figures)), [program.replace(", ", ",\n") for program in figures], fontsize=7)
        axis.set_title(name, fontsize=9)
    panels.tight_layout()
    panels.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=tuple(COMMANDS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds of rest between two runs")
    arguments = parser.parse_args()
    arguments.model, arguments.data = arguments.model.resolve(), arguments.data.resolve()
    figures = measure(arguments.job, arguments)
    print("\n".join(["", *table(figures)]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.job}.json").write_text(json.dumps(figures, indent=2) + "\n")
    picture(figures, arguments.out / f"{arguments.job}.png")
    print(f"\n{arguments.out / arguments.job}.png, .json")


if __name__ == "__main__":
    main()
