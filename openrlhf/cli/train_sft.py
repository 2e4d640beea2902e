"""Supervised fine-tuning.

    deepspeed --module openrlhf.cli.train_sft --pretrain MODEL --dataset FILE --input_key prompt --output_key answer
    python -m openrlhf.cli.train_sft ...        (one rank)

Writes a Hugging Face folder to ``--save_path``; metrics, report and log go to ``--run_path``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openrlhf.cli.supervised import Command
from openrlhf.config.supervised import SFTConfig

if TYPE_CHECKING:
    from openrlhf.trainer.program import Recipe


def recipe(config: SFTConfig) -> Recipe:
    """Return what is trained: a language model on demonstrations."""
    from openrlhf.datasets.sft import SFTDataset
    from openrlhf.trainer.program import Recipe
    from openrlhf.trainer.sft import SFTTrainer

    return Recipe(SFTTrainer, SFTDataset, "first_exhausted")


command = Command("train_sft", SFTConfig, recipe)

if __name__ == "__main__":
    command()
