"""Reward model training on pairs of a preferred and another answer.

    deepspeed --module openrlhf.cli.train_rm --pretrain MODEL --dataset FILE --prompt_key prompt --chosen_key better
    python -m openrlhf.cli.train_rm ...        (one rank)

Writes a folder to ``--save_path`` that ``AutoModelForSequenceClassification`` loads; the rest goes to ``--run_path``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from openrlhf.cli.common import run
from openrlhf.config.groups import RewardModelConfig
from openrlhf.strategy import signals
from openrlhf.trainer.setup import Run, open_run, start_up_lines

if TYPE_CHECKING:
    from openrlhf.trainer.inputs import Inputs


def train(config: RewardModelConfig) -> None:
    """Train as ``config`` says, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
    with open_run(config, "train_rm") as opened:
        _train(config, opened)


def read(config: RewardModelConfig) -> Inputs:
    """Return the tokenizer and the data, before any model."""
    from openrlhf.datasets.reward import PreferenceDataset
    from openrlhf.models.suitability import check_model
    from openrlhf.trainer.inputs import read_inputs

    return read_inputs(config, PreferenceDataset, "all_exhausted", check_model)


def _train(config: RewardModelConfig, opened: Run) -> None:
    from openrlhf.models.value_head import ValueModel, load_value_model
    from openrlhf.strategy.export import export_model
    from openrlhf.trainer.loop import total_steps
    from openrlhf.trainer.program import finish_run, joined_ranks, supervised_callbacks
    from openrlhf.trainer.reward_model import RewardModelTrainer

    opened.phase("data preparation")
    inputs = read(config)
    with joined_ranks(config) as strategy:
        opened.phase("model")
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
        model = ValueModel(
            classifier,
            packing_samples=config.attention.packing_samples,
            aux_loss_coef=config.model.aux_loss_coef,
        )
        opened.say(*start_up_lines(config, opened, strategy, model, inputs.train, inputs.evaluation))
        engine = strategy.prepare_train(model, config.optim, total_steps(len(inputs.train), config.batch))
        export = partial(export_model, engine, strategy, tokenizer=inputs.tokenizer)
        callbacks = supervised_callbacks(config, opened, strategy, export, shown=("loss", "acc"))
        trainer = RewardModelTrainer(
            engine,
            strategy,
            inputs.train,
            inputs.evaluation,
            config.batch,
            callbacks,
            loss=config.loss,
            margin_loss=config.margin_loss,
        )
        with signals.held():
            trainer.fit()
            finish_run(config, opened, strategy, export, trainer)


if __name__ == "__main__":
    run(RewardModelConfig, train, "train_rm", data=lambda config: read(config).train)
