"""Kahneman-Tversky optimisation on answers that are each said to be desirable or not.

    deepspeed --module openrlhf.cli.train_kto --pretrain MODEL --dataset FILE --input_key prompt --output_key answer
    python -m openrlhf.cli.train_kto ...        (one rank)

Writes a Hugging Face folder to ``--save_path``; metrics, report and log go to ``--run_path``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openrlhf.cli.supervised import Command
from openrlhf.config.supervised import KTOConfig

if TYPE_CHECKING:
    from openrlhf.trainer.program import Recipe


def recipe(config: KTOConfig) -> Recipe:
    """Return what is trained: a language model on single answers, against what it was."""
    from openrlhf.datasets.unpaired_preference import UnpairedPreferenceDataset
    from openrlhf.trainer.kto import KTOTrainer
    from openrlhf.trainer.program import Recipe

    return Recipe(KTOTrainer, UnpairedPreferenceDataset, "all_exhausted", options=options, least_rows=2)


def options(config: KTOConfig, strategy: Any, inputs: Any, engine: Any) -> dict[str, Any]:
    """Return the weights of the loss, and the reference model."""
    from openrlhf.trainer.frozen import load_reference
    from openrlhf.trainer.mismatched import mismatched_sets

    def sets() -> list[Any]:
        return inputs.sets() + mismatched_sets(inputs.train, inputs.evaluation, config.batch)

    return {
        "reference": load_reference(
            config, strategy, engine, config.model.pretrain, "--pretrain", sets, inputs.folder
        ),
        "beta": config.beta,
        "desirable_weight": config.desirable_loss_weight,
        "undesirable_weight": config.undesirable_loss_weight,
    }


command = Command("train_kto", KTOConfig, recipe)

if __name__ == "__main__":
    command()
