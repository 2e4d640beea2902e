"""Supervised fine-tuning.

    deepspeed --module openrlhf.cli.train_sft --pretrain MODEL --dataset FILE --input_key prompt --output_key answer
    python -m openrlhf.cli.train_sft ...        (one rank)

Writes a Hugging Face folder to ``--save_path``; metrics, report and log go to ``--run_path``.
"""

from __future__ import annotations

from functools import partial

from openrlhf.cli.common import run
from openrlhf.config.groups import SFTConfig
from openrlhf.strategy import signals
from openrlhf.trainer.setup import Run, open_run, start_up_lines


def train(config: SFTConfig) -> None:
    """Train as ``config`` says, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
    with open_run(config, "train_sft") as opened:
        _train(config, opened)


def _train(config: SFTConfig, opened: Run) -> None:
    from openrlhf.datasets.blending import load_train_eval
    from openrlhf.datasets.sft import SFTDataset
    from openrlhf.models.actor import Actor
    from openrlhf.models.loading import load_causal_lm
    from openrlhf.models.tokenizer import load_tokenizer
    from openrlhf.strategy.export import export_model
    from openrlhf.trainer.loop import total_steps
    from openrlhf.trainer.program import finish_run, joined_ranks, supervised_callbacks
    from openrlhf.trainer.sft import SFTTrainer

    with joined_ranks(config) as strategy:
        tokenizer = load_tokenizer(
            config.model.pretrain,
            use_fast=not config.model.disable_fast_tokenizer,
            trust_remote_code=config.model.trust_remote_code,
            chat_template=config.data.tokenizer_chat_template,
        )
        opened.phase("data preparation")
        train_rows, eval_rows = load_train_eval(config.data, config.batch.seed, "first_exhausted")
        train_data = SFTDataset(train_rows, tokenizer, config.data)
        eval_data = SFTDataset(eval_rows, tokenizer, config.data) if len(eval_rows) else []
        opened.phase("model")
        language_model = load_causal_lm(config.model.pretrain, config.model, context=strategy.loading_context)
        model = Actor(language_model, packing_samples=config.attention.packing_samples)
        opened.say(*start_up_lines(config, opened, strategy, model, train_data, eval_data))
        engine = strategy.prepare_train(model, config.optim, total_steps(len(train_data), config.batch))
        export = partial(export_model, engine, strategy, tokenizer=tokenizer)
        callbacks = supervised_callbacks(config, opened, strategy, export, shown=("gpt_loss",))
        trainer = SFTTrainer(engine, strategy, train_data, eval_data, config.batch, callbacks)
        with signals.held():
            trainer.fit()
            finish_run(config, opened, strategy, export, trainer)


if __name__ == "__main__":
    run(SFTConfig, train, "train_sft")
