"""What the ranks of the ring tests run: SFT and a reward model on rows of different length, and what they report."""

from __future__ import annotations

from typing import Any

from openrlhf.config.groups import (
    BatchConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    SFTDataConfig,
)
from openrlhf.datasets.reward import PreferenceDataset
from openrlhf.datasets.sft import SFTDataset
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.models.value_head import ValueModel
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.callbacks import Callback
from openrlhf.trainer.loop import Trainer
from openrlhf.trainer.reward_model import RewardModelTrainer
from openrlhf.trainer.sft import SFTTrainer
from tests.cli.supervised import PACE, demonstrations, pairs

ROWS, STEP = 11, 8


class Reports(Callback):
    """Keeps the metrics of every step, with the tokens in place of their pace."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        tokens = metrics["tokens_per_second"] * metrics["time/step"]
        self.steps.append({name: value for name, value in metrics.items() if name not in PACE} | {"tokens": tokens})


def reports(trainer_class: type[Trainer], strategy: DeepSpeedStrategy, model: Any, data: Any, budget: int) -> list:
    """Train two steps, the second of them short; return their metrics and those of an evaluation."""
    dynamic = {"use_dynamic_batch": True, "train_max_tokens_per_gpu": budget} if budget else {}
    batch = BatchConfig(micro_train_batch_size=2, train_batch_size=STEP, **dynamic)
    kept = Reports()
    engine = strategy.prepare_train(model, OptimConfig(learning_rate=1e-3, lr_warmup_ratio=0.0), 2)
    trainer = trainer_class(engine, strategy, data, data, batch, [kept])
    trainer.fit()
    return [*kept.steps, trainer.eval_values(trainer.measure(data, ROWS - 1))]


def trained(folder: str, ring: int, budget: int) -> dict[str, list[dict[str, float]]]:
    """Return the reports of both programs where ``ring`` ranks share a sequence; ``budget`` 0 counts rows."""
    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=2, collective_timeout=60), ring_size=ring)
    strategy.setup_distributed()
    tokenizer, config = load_tokenizer(folder), ModelConfig(pretrain=folder)
    sft = SFTDataset(demonstrations(ROWS), tokenizer, SFTDataConfig(input_key="prompt", output_key="answer"))
    rm = PreferenceDataset(pairs(ROWS), tokenizer, PreferenceDataConfig(prompt_key="prompt"))
    reward_model = ValueModel(load_value_model(folder, config, pad_token_id=tokenizer.pad_token_id, seed=1))
    return {
        "sft": reports(SFTTrainer, strategy, Actor(load_causal_lm(folder, config)), sft, budget),
        "rm": reports(RewardModelTrainer, strategy, reward_model, rm, budget),
    }


def trained_each_way(folder: str, ways: list[list[int]]) -> list[dict[str, list[dict[str, float]]]]:
    """Return the reports of every ``[ring, budget]``."""
    return [trained(folder, *way) for way in ways]
