"""Supervised fine-tuning.

    deepspeed --module openrlhf.cli.train_sft --pretrain MODEL --dataset FILE --input_key prompt --output_key answer
    python -m openrlhf.cli.train_sft ...        (one rank)

Writes a Hugging Face folder to ``--save_path``; metrics, report and log go to ``--run_path``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from openrlhf.cli.common import run
from openrlhf.config.groups import SFTConfig
from openrlhf.strategy import signals
from openrlhf.trainer.setup import Run, open_run, start_up_lines

if TYPE_CHECKING:
    from openrlhf.trainer.inputs import Inputs


def train(config: SFTConfig) -> None:
    """Train as ``config`` says, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
    with open_run(config, "train_sft") as opened:
        _train(config, opened)


def read(config: SFTConfig) -> Inputs:
    """Return the tokenizer and the data, before any model."""
    from openrlhf.datasets.sft import SFTDataset
    from openrlhf.trainer.inputs import read_inputs

    return read_inputs(config, SFTDataset, "first_exhausted")


def _train(config: SFTConfig, opened: Run) -> None:
    from openrlhf.models.actor import Actor
    from openrlhf.models.loading import load_causal_lm
    from openrlhf.strategy.export import export_model
    from openrlhf.trainer.loop import total_steps
    from openrlhf.trainer.program import finish_run, joined_ranks, supervised_callbacks
    from openrlhf.trainer.sft import SFTTrainer

    opened.phase("data preparation")
    inputs = read(config)
    with joined_ranks(config) as strategy:
        opened.phase("model")
        language_model = load_causal_lm(
            config.model.pretrain,
            config.model,
            lora=config.lora,
            context=strategy.loading_context,
            seed=config.batch.seed,
        )
        model = Actor(
            language_model,
            packing_samples=config.attention.packing_samples,
            aux_loss_coef=config.model.aux_loss_coef,
        )
        opened.say(*start_up_lines(config, opened, strategy, model, inputs.train, inputs.evaluation))
        engine = strategy.prepare_train(model, config.optim, total_steps(len(inputs.train), config.batch))
        export = partial(export_model, engine, strategy, tokenizer=inputs.tokenizer)
        callbacks = supervised_callbacks(config, opened, strategy, export, shown=("gpt_loss",))
        trainer = SFTTrainer(engine, strategy, inputs.train, inputs.evaluation, config.batch, callbacks)
        with signals.held():
            trainer.fit()
            finish_run(config, opened, strategy, export, trainer)


if __name__ == "__main__":
    run(SFTConfig, train, "train_sft", data=lambda config: read(config).train)
