"""Reward model training on pairs of a preferred and another answer.

    deepspeed --module openrlhf.cli.train_rm --pretrain MODEL --dataset FILE --prompt_key prompt --chosen_key better
    python -m openrlhf.cli.train_rm ...        (one rank)

Writes a folder to ``--save_path`` that ``AutoModelForSequenceClassification`` loads; the rest goes to ``--run_path``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openrlhf.cli.supervised import Command
from openrlhf.config.supervised import RewardModelConfig

if TYPE_CHECKING:
    from openrlhf.models.value_head import ValueModel
    from openrlhf.trainer.program import Recipe


def recipe(config: RewardModelConfig) -> Recipe:
    """Return what is trained: a classifier with one label on pairs."""
    from openrlhf.datasets.reward import PreferenceDataset
    from openrlhf.models.suitability import check_model
    from openrlhf.trainer.program import Recipe
    from openrlhf.trainer.reward_model import RewardModelTrainer

    return Recipe(
        RewardModelTrainer,
        PreferenceDataset,
        "all_exhausted",
        model=load,
        options=lambda *_: {"loss": config.loss, "margin_loss": config.margin_loss},
        check=check_model,
    )


def load(config: RewardModelConfig, strategy: Any, inputs: Any) -> ValueModel:
    """Return the reward model, with a fresh head where ``--pretrain`` has none."""
    from openrlhf.models.value_head import ValueModel, load_value_model

    classifier = load_value_model(
        config.model.pretrain,
        config.model,
        lora=config.lora,
        gather=strategy.gather,
        context=strategy.loading_context,
        value_head_prefix=config.value_head_prefix,
        pad_token_id=inputs.tokenizer.pad_token_id,
        seed=config.batch.seed,
    )
    return ValueModel(
        classifier,
        packing_samples=config.attention.packing_samples,
        aux_loss_coef=config.model.aux_loss_coef,
    )


command = Command("train_rm", RewardModelConfig, recipe)

if __name__ == "__main__":
    command()
