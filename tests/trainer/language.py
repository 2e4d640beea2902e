"""What the tests of the trainers of language models share: one rank, a tiny policy, and a frozen model beside it."""

from __future__ import annotations

from functools import partial

import torch

from openrlhf.config.groups import BatchConfig, DeepSpeedConfig, ModelConfig, OptimConfig
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.callbacks import Callback
from openrlhf.trainer.frozen import answer_log_probs


def solo() -> DeepSpeedStrategy:
    """Return the strategy of one rank. DeepSpeed keeps the first process group it sees, so nobody closes it."""
    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=0), bf16=False, micro_batch_size=4)
    strategy.setup_distributed()
    return strategy


def actor(folder: str) -> Actor:
    return Actor(load_causal_lm(folder, ModelConfig(pretrain=folder)))


def reference_of(folder: str):
    """Return what the model in ``folder`` says of a batch."""
    return partial(answer_log_probs, solo().prepare_eval(actor(folder)))


def trainer_of(kind: type, folder: str, data, eval_data=(), micro: int = 4, rows: int = 8, budget: int = 0, **options):
    """Return a trainer of the model in ``folder`` whose steps have so many rows; a budget of tokens can cut them."""
    strategy = solo()
    dynamic = {"use_dynamic_batch": True, "train_max_tokens_per_gpu": budget} if budget else {}
    batch = BatchConfig(micro_train_batch_size=micro, train_batch_size=rows, **dynamic)
    engine = strategy.prepare_train(actor(folder), OptimConfig(learning_rate=3e-3, lr_warmup_ratio=0.0), 10)
    return kind(engine, strategy, data, eval_data, batch, **options)


class Recorder(Callback):
    """Keeps the metrics of every step."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def on_step_end(self, trainer, metrics: dict[str, float]) -> None:
        """Keep them."""
        self.steps.append(metrics)


def answer_log_prob(model, row) -> float:
    """Return the log-prob of what a row trains, by transformers alone, in double precision."""
    ids = torch.tensor(row.token_ids)
    with torch.no_grad():
        log_probs = model.double()(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return log_probs[torch.tensor(row.loss_mask)].sum().item()


def transformers_model(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
