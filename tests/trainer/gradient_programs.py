"""What the ranks of the gradient tests run: the gradients that an engine applies, against plain torch.

A case is a loss, packed or padded rows, a ZeRO stage and the rows of a micro-batch. Its gradients come from one step
of the real trainer or worker: Adam's first moment after the first step is ``1 - beta1`` times the gradient that was
applied. The other side is autograd of the formula in double precision, one sequence at a time: no padding, ranks or
micro-batches. Seven rows leave a rank without rows in its last micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.config.groups import BatchConfig, DeepSpeedConfig, ModelConfig, OptimConfig
from openrlhf.config.ppo import AlgorithmConfig, PPOConfig, PPOModelConfig, PPOOptimConfig, RewardConfig, RolloutConfig
from openrlhf.datasets.batch import PreferenceBatch, TokenBatch
from openrlhf.models.actor import Actor
from openrlhf.models.attention import switch_attention
from openrlhf.models.backbone import TokenModel
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel
from openrlhf.rollout.types import Experience
from openrlhf.strategy.deepspeed import DeepSpeedStrategy, TrainEngine
from openrlhf.trainer.ppo.groups import deal
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker
from openrlhf.trainer.reward_model import RewardModelTrainer
from openrlhf.trainer.sft import SFTTrainer
from tests.strategy.programs import BETAS, first_gradients

LENGTHS = (13, 4, 9, 6, 12, 5, 11)
ROWS, WIDTH, TEMPERATURE, WHITEN = len(LENGTHS), max(LENGTHS), 0.7, (0.1, 1.3)
OPTIMIZER = OptimConfig(learning_rate=1e-3, lr_scheduler="constant", adam_betas=BETAS)


def sequences(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens ``(ROWS, WIDTH)``, the mask of the real ones, and the places ``(ROWS, WIDTH - 1)`` that count."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(3, 300, (ROWS, WIDTH), generator=generator) * real
    return tokens, real, real[:, 1:] & (torch.arange(WIDTH - 1) >= torch.tensor(LENGTHS)[:, None] // 3)


def noise(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(ROWS, WIDTH - 1, generator=torch.Generator().manual_seed(seed))


class Rows:
    """A data set of the rows of one batch; a rank without rows gets a dummy that counts nothing."""

    def __init__(self, batch: TokenBatch):
        self.batch = batch

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> int:
        return row

    @property
    def lengths(self) -> list[int]:
        return self.batch.attention_mask.sum(dim=1).view(-1, ROWS).sum(dim=0).tolist()

    def collate(self, rows: list[int]) -> TokenBatch:
        batch, pairs = self.batch, isinstance(self.batch, PreferenceBatch)
        index = torch.tensor((rows or [0]) + [ROWS + row for row in rows or [0]] * pairs)
        counted = batch.loss_mask[index] if rows else torch.zeros_like(batch.loss_mask[index])
        margin = {"margin": batch.margin[rows or [0]]} if pairs else {}
        return type(batch)(batch.sequences[index], batch.attention_mask[index], counted, **margin)


def sft_rows() -> Rows:
    return Rows(TokenBatch(*sequences(1)))


def pairs() -> Rows:
    both = [torch.cat(parts) for parts in zip(sequences(2), sequences(3), strict=True)]
    return Rows(PreferenceBatch(*both, margin=torch.linspace(-0.5, 1.0, ROWS)))


# The formulas, one sequence at a time.


def causal_lm(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float64)


def classifier(folder: str) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward", num_labels=1, dtype=torch.float64)


def plain_log_probs(model: nn.Module, tokens: Tensor, real: Tensor, temperature: float = 1.0) -> Tensor:
    rows = []
    for row, keep in zip(tokens, real, strict=True):
        logits = model(row[keep][None]).logits[0, :-1] / temperature
        found = logits.log_softmax(-1).gather(1, row[keep][1:, None]).squeeze(1)
        rows.append(nn.functional.pad(found, (0, WIDTH - 1 - len(found))))
    return torch.stack(rows)


def plain_values(model: nn.Module, tokens: Tensor, real: Tensor) -> Tensor:
    """Return ``(B, WIDTH)`` values, 0 on padding."""
    rows = [model.score(model.model(row[keep][None]).last_hidden_state)[0, :, 0] for row, keep in zip(tokens, real)]
    return torch.stack([nn.functional.pad(row, (0, WIDTH - len(row))) for row in rows])


def sft_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, (tokens, real, counted) = causal_lm(folder), sequences(1)
    return model, -plain_log_probs(model, tokens, real)[counted].mean()


def rm_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, batch = classifier(folder), pairs().batch
    last = batch.attention_mask.sum(dim=1) - 1
    chosen, rejected = plain_values(model, batch.sequences, batch.attention_mask)[range(2 * ROWS), last].chunk(2)
    return model, -nn.functional.logsigmoid(chosen - rejected - batch.margin).mean()


def policy_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, sample = causal_lm(folder), experience(folder)
    log_probs = plain_log_probs(model, sample.sequences, sample.attention_mask, TEMPERATURE)
    ratio, advantages = (log_probs - sample.log_probs).exp(), (sample.advantages - WHITEN[0]) * WHITEN[1]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return model, loss[sample.action_mask].mean()


def value_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, sample = classifier(folder), experience(folder)
    values = plain_values(model, sample.sequences, sample.attention_mask)[:, :-1]
    kept = sample.values + (values - sample.values).clamp(-0.2, 0.2)
    loss = 0.5 * torch.maximum((values - sample.returns) ** 2, (kept - sample.returns) ** 2)
    return model, loss[sample.action_mask].mean()


@cache
def experience(folder: str) -> Experience:
    """Return samples whose old log-probs and values are off by about the clip ranges, so that some are clipped."""
    tokens, real, actions = sequences(4)
    with torch.no_grad():
        log_probs = plain_log_probs(causal_lm(folder), tokens, real, TEMPERATURE).float() + noise(5, 0.2)
        values = plain_values(classifier(folder), tokens, real)[:, :-1].float() + noise(6, 0.2)
    nothing = torch.zeros(ROWS, WIDTH - 1)
    return Experience(
        sequences=tokens, attention_mask=real, action_mask=actions, rollout_log_probs=nothing,
        sample=torch.arange(ROWS), log_probs=log_probs, ref_log_probs=nothing, kl=nothing, scores=torch.zeros(ROWS),
        values=values, advantages=noise(7), returns=noise(8),
    )  # fmt: skip


def reference(folder: str, formula: Callable[[str], tuple[nn.Module, Tensor]]) -> dict[str, Tensor]:
    model, loss = formula(folder)
    loss.backward()
    return {f"model.{name}": param.grad for name, param in model.named_parameters()}


# The same through the trainers and the workers.


def ready(engine: TrainEngine, packed: bool) -> TrainEngine:
    """Choose between packed and padded rows, after the check of the first forward."""
    model: TokenModel = engine.module
    engine.eval()
    with torch.no_grad():
        engine(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    if not model.packed:
        raise ValueError("this model should be one that can be packed")
    if not packed:
        model.packed = False
        switch_attention(model.model, model.padded_attention)
    return engine


def sft_step(folder: str, strategy: DeepSpeedStrategy, packed: bool, batch: BatchConfig) -> TrainEngine:
    model = load_causal_lm(f"{folder}/policy", ModelConfig(), context=strategy.loading_context)
    engine = ready(strategy.prepare_train(Actor(model), OPTIMIZER, 1), packed)
    SFTTrainer(engine, strategy, sft_rows(), (), batch).fit()
    return engine


def rm_step(folder: str, strategy: DeepSpeedStrategy, packed: bool, batch: BatchConfig) -> TrainEngine:
    model = load_value_model(
        f"{folder}/reward", ModelConfig(), gather=strategy.gather, context=strategy.loading_context, pad_token_id=0
    )
    engine = ready(strategy.prepare_train(ValueModel(model), OPTIMIZER, 1), packed)
    trainer = RewardModelTrainer(engine, strategy, pairs(), (), batch, margin_loss=True)
    trainer.fit()
    return engine


def ppo_config(folder: str, stage: int, batch: BatchConfig) -> PPOConfig:
    return PPOConfig(
        model=PPOModelConfig(pretrain=f"{folder}/policy", critic_pretrain=f"{folder}/reward"),
        reward=RewardConfig(remote_rm_url="unused.py"),
        algorithm=AlgorithmConfig(advantage_estimator="gae"),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optim=PPOOptimConfig(adam_betas=BETAS, max_norm=0.0, lr_warmup_ratio=0.0),
        deepspeed=DeepSpeedConfig(zero_stage=stage),
        batch=batch,
    )


def ppo_step(
    worker_class: type, folder: str, strategy: DeepSpeedStrategy, packed: bool, batch: BatchConfig, **common: Any
) -> TrainEngine:
    worker = worker_class(ppo_config(folder, strategy.config.zero_stage, batch), strategy, max_steps=1)
    ready(worker.engine, packed)
    mine = deal(range(ROWS), strategy.world_size)[strategy.rank]
    worker.update([experience(folder).select(mine)], rollout=1, **common)
    return worker.engine


def policy_step(*arguments: Any) -> TrainEngine:
    return ppo_step(PolicyWorker, *arguments, whiten=WHITEN)


def value_step(*arguments: Any) -> TrainEngine:
    return ppo_step(CriticWorker, *arguments)


LOSSES = {
    "sft": (sft_formula, sft_step),
    "rm": (rm_formula, rm_step),
    "policy": (policy_formula, policy_step),
    "value": (value_formula, value_step),
}


def differences(folder: str, cases: list[list], ring: int = 1, budget: int = 0) -> list[tuple[str, float]]:
    """Return for each ``[loss, packed, stage, micro-batch]`` the tensor that is furthest off, and by how much.

    The measure is the norm of the difference over the norm of plain torch's gradient, tensor by tensor. ``ring`` ranks
    share each sequence; ``budget`` tokens a rank take the place of the rows of a micro-batch.
    """
    expected = {loss: reference(folder, LOSSES[loss][0]) for loss in {case[0] for case in cases}}
    dynamic = {"use_dynamic_batch": True, "train_max_tokens_per_gpu": budget} if budget else {}
    found = []
    for loss, packed, stage, micro in cases:
        strategy = DeepSpeedStrategy(
            DeepSpeedConfig(zero_stage=stage, collective_timeout=60), max_norm=0.0, param_persistence_threshold=0,
            ring_size=ring,
        )  # fmt: skip
        strategy.setup_distributed()
        batch = BatchConfig(micro_train_batch_size=micro, train_batch_size=8, **dynamic)
        gradients = first_gradients(LOSSES[loss][1](folder, strategy, packed, batch))
        if gradients.keys() != expected[loss].keys():
            raise ValueError(f"{sorted(gradients)} are not {sorted(expected[loss])}")
        off = {
            name: float((gradients[name].double() - plain).norm() / plain.norm())
            for name, plain in expected[loss].items()
        }
        worst = max(off, key=lambda name: off[name])
        found.append((worst, off[worst]))
    return found


def ring_cases() -> list[list]:
    """Return 24 cases: the losses that a ring can have, 4 stages, 3 sizes of a micro-batch."""
    return [list(case) for case in product(("sft", "rm"), (True,), (0, 1, 2, 3), (1, 2, 4))]


def every_case() -> list[list]:
    """Return 96 cases for a number of ranks: 4 losses, packed and padded, 4 stages, 3 sizes of a micro-batch."""
    return [list(case) for case in product(LOSSES, (True, False), (0, 1, 2, 3), (1, 2, 4))]
