"""What the ranks of the poison tests run: steps in which one number on one rank is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openrlhf.config.groups import BatchConfig, DeepSpeedConfig, ModelConfig
from openrlhf.errors import NumericError
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel
from openrlhf.rollout.types import Experience
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import TrainEngine
from openrlhf.trainer.callbacks import Callback
from openrlhf.trainer.ppo.groups import deal
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker
from openrlhf.trainer.reward_model import RewardModelTrainer
from openrlhf.trainer.sft import SFTTrainer
from tests.strategy.programs import weights
from tests.trainer import gradient_programs as clean

MARK = 310
"""The token that marks what is poisoned: no other row has it."""


class SpoiltGradient(torch.autograd.Function):
    """The number itself; its gradient times ``factor``."""

    @staticmethod
    def forward(ctx, number: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return number.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "nan loss": lambda loss: loss * float("nan"),
    "inf loss": lambda loss: loss + float("inf"),  # whose gradient is finite
    "nan gradient": lambda loss: SpoiltGradient.apply(loss, float("nan")),
    "inf gradient": lambda loss: SpoiltGradient.apply(loss, float("inf")),
}


def spoilt(how: str, batch: Any, loss: Tensor) -> Tensor:
    """Return the loss of a micro-batch, spoilt if the batch holds the mark."""
    return SPOIL[how](loss) if how in SPOIL and bool((batch.sequences == MARK).any()) else loss


class PoisonedSFT(SFTTrainer):
    how = ""

    def compute_loss(self, batch):
        output = super().compute_loss(batch)
        return output._replace(loss_sum=spoilt(self.how, batch, output.loss_sum))


class PoisonedRM(RewardModelTrainer):
    how = ""

    def compute_loss(self, batch):
        output = super().compute_loss(batch)
        return output._replace(loss_sum=spoilt(self.how, batch, output.loss_sum))


class PoisonedPolicy(PolicyWorker):
    how = ""

    def loss(self, batch, whiten):
        output = super().loss(batch, whiten)
        return output._replace(loss_sum=spoilt(self.how, batch, output.loss_sum))


class PoisonedCritic(CriticWorker):
    how = ""

    def loss(self, batch, whiten):
        output = super().loss(batch, whiten)
        return output._replace(loss_sum=spoilt(self.how, batch, output.loss_sum))


class Snapshots(Callback):
    """Keeps the weights and the metrics after each step."""

    def __init__(self):
        self.weights: dict[str, Tensor] = {}
        self.steps: list[dict[str, float]] = []

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.weights = weights(trainer.engine)
        self.steps.append(metrics)


def supervised(folder: str, strategy: DeepSpeedStrategy, trainer_class: type, batch: BatchConfig):
    """Return a trainer over seven rows, four to a step, and its snapshots."""
    if trainer_class is PoisonedSFT:
        rows = clean.sft_rows()
        model = Actor(load_causal_lm(f"{folder}/policy", ModelConfig(), context=strategy.loading_context))
    else:
        rows = clean.pairs()
        context = {"gather": strategy.gather, "context": strategy.loading_context}
        model = ValueModel(load_value_model(f"{folder}/reward", ModelConfig(), pad_token_id=0, **context))
    snapshots = Snapshots()
    engine = strategy.prepare_train(model, clean.OPTIMIZER, 2)
    return trainer_class(engine, strategy, rows, (), batch, [snapshots]), snapshots


def poisoned_training(
    folder: str, strategy: DeepSpeedStrategy, trainer_class: type, how: str, rank: int, **batch: int
) -> dict[str, Any]:
    """Train two steps, the second with a poisoned row on ``rank``; return what became of it."""
    sizes = BatchConfig(train_batch_size=4, micro_train_batch_size=1, **batch)
    trainer, snapshots = supervised(folder, strategy, trainer_class, sizes)
    row = trainer.sampler.step_rows(0, 1)[rank]
    trainer.train_data.batch.sequences[row, 0] = MARK
    trainer.how = how
    error = message_of(trainer.fit)
    return outcome(trainer.engine, snapshots.weights, error, f"rows [{row}]") | {"steps": snapshots.steps}


def poisoned_update(
    folder: str, strategy: DeepSpeedStrategy, worker_class: type, how: str, rank: int
) -> dict[str, Any]:
    """Update twice, the second time with a poisoned sample on ``rank``; return what became of it."""
    sizes = BatchConfig(train_batch_size=8, micro_train_batch_size=1)
    worker = worker_class(clean.ppo_config(folder, strategy.config.zero_stage, sizes), strategy, max_steps=2)
    worker.how = how
    shares = deal(range(clean.ROWS), strategy.world_size)
    mine, sample = shares[strategy.rank], shares[rank][0]
    good = clean.experience(folder)
    worker.update([good.select(mine)], rollout=1, whiten=(0.0, 1.0))
    before = weights(worker.engine)
    bad = [mark(good, sample, how).select(mine)]
    error = message_of(lambda: worker.update(bad, rollout=2, whiten=(0.0, 1.0)))
    return outcome(worker.engine, before, error, f"samples [{sample}]")


def mark(good: Experience, sample: int, how: str) -> Experience:
    """Return a copy of the experience with the mark in one sample; some poisons are in its numbers."""
    bad = good.select(range(len(good)))
    bad.sequences[sample, 0] = MARK
    if how == "inf advantage":
        bad.advantages[sample] = float("inf")
    elif how == "return overflow":
        bad.returns[sample] = 1e30
    return bad


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except NumericError as error:
        return str(error)
    return ""


def outcome(engine: TrainEngine, before: dict[str, Tensor], error: str, named: str) -> dict[str, Any]:
    after = weights(engine)
    return {
        "stopped": bool(error),
        "names the row": named in error,
        "unchanged": all(torch.equal(before[name], after[name]) for name in after),
        "finite": all(bool(weight.isfinite().all()) for weight in after.values()),
        "message": error,
    }


WHERE: dict[str, tuple[Callable[..., dict], type]] = {
    "sft": (poisoned_training, PoisonedSFT),
    "rm": (poisoned_training, PoisonedRM),
    "policy": (poisoned_update, PoisonedPolicy),
    "critic": (poisoned_update, PoisonedCritic),
}


def strategy_of(stage: int) -> DeepSpeedStrategy:
    config = DeepSpeedConfig(zero_stage=stage, collective_timeout=60)
    strategy = DeepSpeedStrategy(config, max_norm=1.0, param_persistence_threshold=0)
    strategy.setup_distributed()
    return strategy


def poison(folder: str, cases: list[list], stages: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Return what became of each ``[who learns, what is not finite, on which rank, ZeRO stage]``.

    And for each of ``stages`` what became of a poisoned step that may be left out.
    """
    stopped = []
    for who, how, rank, stage in cases:
        run, learner = WHERE[who]
        stopped.append(run(folder, strategy_of(stage), learner, how, rank))
    left_out = [
        poisoned_training(folder, strategy_of(stage), PoisonedSFT, "inf loss", 1, max_skipped_steps=1, max_epochs=2)
        for stage in stages
    ]
    return {"stopped": stopped, "left out": left_out}
