"""The same work in TRL, in an environment of its own (torch 2.13.0, trl 1.16.0, peft): one JSON line of figures.

    python benchmarks/peer_trl.py JOB MODEL_DIR DATA_DIR [--precision fp32|autocast|bf16] [--group]

``autocast`` keeps fp32 weights and computes in bf16, ``bf16`` keeps bf16 weights without an fp32 master copy,
``--group`` puts rows of similar length into one batch. ``rloo`` runs TRL's GRPO trainer, its closest to ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

STEPS = {"sft": 20, "rm": 20, "dpo": 20, "kto": 20, "rloo": 4, "sort_grpo": 40, "sort_rloo": 40}
ROWS, COMPLETIONS, SAMPLES, NEW_TOKENS = 8, 64, 4, 128


def rows(path: Path, count: int) -> list[dict]:
    """Return the first rows of a jsonl file."""
    with path.open() as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def turn(role: str, content: str) -> list[dict[str, str]]:
    """Return a conversation of one message."""
    return [{"role": role, "content": content}]


def common(job: str, precision: str) -> dict:
    """Return the settings that all trainers share."""
    import torch

    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": STEPS[job],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": precision == "autocast",
        "gradient_checkpointing": False,
        "logging_steps": STEPS[job],
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def sft(model: str, data: Path, precision: str, group: bool) -> dict[str, float]:
    """Train on questions and answers; return the tokens and seconds."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_list(
        [
            {"messages": turn("user", row["question"]) + turn("assistant", row["answer"])}
            for row in rows(data / "gsm8k_train.jsonl", STEPS["sft"] * ROWS)
        ]
    )
    config = SFTConfig(
        **common("sft", precision),
        per_device_train_batch_size=ROWS,
        max_length=1024,
        model_init_kwargs={"dtype": "bfloat16" if precision == "bf16" else "float32"},
        **({"train_sampling_strategy": "group_by_length"} if group else {}),
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset)
    seconds = timed(trainer.train)
    tokens = max(entry.get("num_tokens", 0) for entry in trainer.state.log_history)
    return {"tokens/s": tokens / seconds}


def pairs(data: Path, job: str):
    """Return the pairs of all steps as conversations."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": turn("user", row["prompt"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }
            for row in rows(data / "gsm8k_preference_train.jsonl", STEPS[job] * ROWS)
        ]
    )


def rm(model: str, data: Path, precision: str, group: bool) -> dict[str, float]:
    """Train on pairs; return pairs a second."""
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**common("rm", precision), per_device_train_batch_size=ROWS, max_length=1024)
    trainer = RewardTrainer(model=model, args=config, train_dataset=pairs(data, "rm"))
    return {"pairs/s": STEPS["rm"] * ROWS / timed(trainer.train)}


def dpo(model: str, data: Path, precision: str, group: bool) -> dict[str, float]:
    """Train on pairs against the model as it was; return pairs a second."""
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**common("dpo", precision), per_device_train_batch_size=ROWS, max_length=1024)
    trainer = DPOTrainer(model=model, args=config, train_dataset=pairs(data, "dpo"))
    return {"pairs/s": STEPS["dpo"] * ROWS / timed(trainer.train)}


def kto(model: str, data: Path, precision: str, group: bool) -> dict[str, float]:
    """Train on single answers against the model as it was; return rows a second."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    answers = [
        {
            "prompt": turn("user", row["prompt"]),
            "completion": turn("assistant", row["completion"]),
            "label": row["label"],
        }
        for row in rows(data / "gsm8k_unpaired_train.jsonl", STEPS["kto"] * ROWS)
    ]
    config = KTOConfig(**common("kto", precision), per_device_train_batch_size=ROWS, max_length=1024)
    trainer = KTOTrainer(model=model, args=config, train_dataset=Dataset.from_list(answers))
    return {"rows/s": STEPS["kto"] * ROWS / timed(trainer.train)}


def rloo(model: str, data: Path, precision: str, group: bool) -> dict[str, float]:
    """Train on sampled answers; return completions a second, over all and in generation."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts = [
        {"prompt": turn("user", row["question"][:200])}
        for row in rows(data / "gsm8k_train.jsonl", STEPS["rloo"] * COMPLETIONS // SAMPLES)
    ]
    config = GRPOConfig(
        **common("rloo", precision),
        per_device_train_batch_size=COMPLETIONS // SAMPLES,
        gradient_accumulation_steps=SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        beta=0.01,
    )
    trainer = GRPOTrainer(model=model, reward_funcs=length, args=config, train_dataset=Dataset.from_list(prompts))
    return completions_a_second(trainer, STEPS["rloo"] * COMPLETIONS)


def sort(kind: str, model: str, data: Path, precision: str, group: bool) -> dict[str, float]:
    """Train ``GRPO`` or ``RLOO`` on the quickstart's task: two steps of 128 answers for each rollout of 256."""
    import trl
    from datasets import Dataset

    steps = STEPS["sort_grpo"]
    prompts = [
        {"prompt": turn("user", row["prompt"]), "label": row["label"]}
        for row in rows(data / "prompts_train.jsonl", steps * 16)
    ]
    config = getattr(trl, f"{kind}Config")(
        **common("sort_grpo", precision),
        per_device_train_batch_size=128,
        steps_per_generation=2,
        num_generations=8,
        max_completion_length=12,
        learning_rate=3e-4,
        beta=0.001,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, reward_funcs=exact, args=config, train_dataset=Dataset.from_list(prompts)
    )
    return completions_a_second(trainer, steps * 128)


def completions_a_second(trainer, total: int) -> dict[str, float]:
    """Train and return completions a second, over all and in generation."""
    from transformers import GenerationMixin

    generation = [0.0]
    plain = GenerationMixin.generate

    def counted(*arguments, **options):
        result = []
        generation[0] += timed(lambda: result.append(plain(*arguments, **options)))
        return result[0]

    GenerationMixin.generate = counted
    seconds = timed(trainer.train)
    return {"completions/s": total / seconds, "generated/s": total / generation[0]}


def exact(completions, label, **_) -> list[float]:
    """Reward: 1 for the answer of the task, else 0."""
    return [float(completion[0]["content"] == right) for completion, right in zip(completions, label, strict=True)]


def length(completions, **_) -> list[float]:
    """Reward: the length of the answer modulo 7, which costs nothing."""
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def peak_mib() -> float:
    """Return the peak memory of this process: of the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(action) -> float:
    """Return the seconds that ``action()`` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


JOBS = {
    "sft": sft,
    "rm": rm,
    "dpo": dpo,
    "kto": kto,
    "rloo": rloo,
    "sort_grpo": partial(sort, "GRPO"),
    "sort_rloo": partial(sort, "RLOO"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=tuple(STEPS))
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--precision", choices=("fp32", "autocast", "bf16"), default="autocast")
    parser.add_argument("--group", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    figures = JOBS[arguments.job](arguments.model, arguments.data, arguments.precision, arguments.group)
    if "completions/s" not in figures:
        figures["peak MiB"] = peak_mib()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
