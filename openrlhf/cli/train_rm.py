"""Reward model training on pairs of a preferred and another answer.

    deepspeed --module openrlhf.cli.train_rm --pretrain MODEL --dataset FILE --prompt_key prompt --chosen_key better
    python -m openrlhf.cli.train_rm ...        (one rank)

Writes a folder to ``--save_path`` that ``AutoModelForSequenceClassification`` loads; the rest goes to ``--run_path``.
"""

from __future__ import annotations

from functools import partial

from openrlhf.cli.common import run
from openrlhf.config.groups import RewardModelConfig
from openrlhf.strategy import signals
from openrlhf.trainer.setup import Run, open_run, start_up_lines


def train(config: RewardModelConfig) -> None:
    """Train as ``config`` says, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
    with open_run(config, "train_rm") as opened:
        _train(config, opened)


def _train(config: RewardModelConfig, opened: Run) -> None:
    from openrlhf.datasets.blending import load_train_eval
    from openrlhf.datasets.reward import PreferenceDataset
    from openrlhf.models.tokenizer import load_tokenizer
    from openrlhf.models.value_head import ValueModel, load_value_model
    from openrlhf.strategy.export import export_model
    from openrlhf.trainer.loop import total_steps
    from openrlhf.trainer.program import finish_run, joined_ranks, supervised_callbacks
    from openrlhf.trainer.reward_model import RewardModelTrainer

    with joined_ranks(config) as strategy:
        tokenizer = load_tokenizer(
            config.model.pretrain,
            use_fast=not config.model.disable_fast_tokenizer,
            trust_remote_code=config.model.trust_remote_code,
            chat_template=config.data.tokenizer_chat_template,
        )
        opened.phase("data preparation")
        train_rows, eval_rows = load_train_eval(config.data, config.batch.seed, "all_exhausted")
        train_data = PreferenceDataset(train_rows, tokenizer, config.data)
        eval_data = PreferenceDataset(eval_rows, tokenizer, config.data) if len(eval_rows) else []
        opened.phase("model")
        classifier = load_value_model(
            config.model.pretrain,
            config.model,
            gather=strategy.gather,
            context=strategy.loading_context,
            value_head_prefix=config.value_head_prefix,
            pad_token_id=tokenizer.pad_token_id,
            seed=config.batch.seed,
        )
        model = ValueModel(classifier, packing_samples=config.attention.packing_samples)
        opened.say(*start_up_lines(config, opened, strategy, model, train_data, eval_data))
        engine = strategy.prepare_train(model, config.optim, total_steps(len(train_data), config.batch))
        export = partial(export_model, engine, strategy, tokenizer=tokenizer)
        callbacks = supervised_callbacks(config, opened, strategy, export, shown=("loss", "acc"))
        trainer = RewardModelTrainer(
            engine,
            strategy,
            train_data,
            eval_data,
            config.batch,
            callbacks,
            loss=config.loss,
            margin_loss=config.margin_loss,
        )
        with signals.held():
            trainer.fit()
            finish_run(config, opened, strategy, export, trainer)


if __name__ == "__main__":
    run(RewardModelConfig, train, "train_rm")
