"""Process reward model training: a language model learns to judge every step of an answer.

    deepspeed --module openrlhf.cli.train_prm --pretrain MODEL --dataset FILE --placeholder_token X --reward_tokens + -
    python -m openrlhf.cli.train_prm ...        (one rank)

Writes a Hugging Face folder to ``--save_path``; metrics, report and log go to ``--run_path``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openrlhf.cli.supervised import Command
from openrlhf.config.supervised import PRMConfig

if TYPE_CHECKING:
    from openrlhf.trainer.program import Recipe


def recipe(config: PRMConfig) -> Recipe:
    """Return what is trained: a language model on the labels of steps."""
    from openrlhf.datasets.process_reward import ProcessRewardDataset
    from openrlhf.trainer.prm import ProcessRewardModelTrainer
    from openrlhf.trainer.program import Recipe

    return Recipe(
        ProcessRewardModelTrainer,
        ProcessRewardDataset,
        "first_exhausted",
        options=lambda config, strategy, inputs, engine: {"reward_ids": inputs.train.reward_ids},
    )


command = Command("train_prm", PRMConfig, recipe)

if __name__ == "__main__":
    command()
