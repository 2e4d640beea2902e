"""Knowledge distillation: a language model learns answers, and what a teacher would say at each of their tokens.

    deepspeed --module openrlhf.cli.train_kd --pretrain MODEL --teacher_model LARGER --dataset FILE --input_key prompt
    python -m openrlhf.cli.train_kd ...        (one rank)

Writes a Hugging Face folder to ``--save_path``; metrics, report and log go to ``--run_path``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openrlhf.cli.supervised import Command
from openrlhf.config.supervised import KDConfig

if TYPE_CHECKING:
    from openrlhf.trainer.program import Recipe


def recipe(config: KDConfig) -> Recipe:
    """Return what is trained: a language model on demonstrations and on its teacher."""
    from openrlhf.datasets.sft import SFTDataset
    from openrlhf.trainer.kd import KDTrainer
    from openrlhf.trainer.program import Recipe

    beside = {"--teacher_model": config.teacher_model}
    return Recipe(KDTrainer, SFTDataset, "first_exhausted", options=options, beside=beside)


def options(config: KDConfig, strategy: Any, inputs: Any, engine: Any) -> dict[str, Any]:
    """Return the teacher and its share."""
    from openrlhf.trainer.frozen import load_frozen

    teacher = load_frozen(config, strategy, config.teacher_model, "--teacher_model", config.teacher_offload)
    return {"teacher": teacher, "kd_coef": config.kd_coef}


command = Command("train_kd", KDConfig, recipe)

if __name__ == "__main__":
    command()
