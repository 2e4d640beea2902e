"""Models that a supervised trainer only asks: the reference of DPO and KTO, the teacher of distillation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.batch import TokenBatch
from openrlhf.datasets.sampler import StepSampler
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.ops.masking import masked_sum
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import TrainEngine
from openrlhf.trainer.setup import frozen_line

LOG = logging.getLogger(__name__)
Reference = Callable[[TokenBatch], Tensor]
"""The log-prob ``(B,)`` of each answer of a batch under a model that never learns."""


def load_frozen(config: Any, strategy: DeepSpeedStrategy, path: str, flag: str, offload: bool) -> Callable[..., Any]:
    """Return the language model at ``path``, named by ``flag``, ready to be called; it never learns.

    ``offload`` keeps its shards in host memory under ZeRO-3. All ranks must call the result equally often.
    """
    model = load_causal_lm(
        path,
        replace(config.model, gradient_checkpointing=False),
        lora=config.lora.without_adapters,
        context=partial(strategy.loading_context, train=False),
        flag=flag,
    )
    LOG.info(frozen_line(config, strategy.world_size, path, flag, model, offload))
    return strategy.prepare_eval(Actor(model, packing_samples=config.attention.packing_samples), offload=offload)


def load_reference(
    config: Any,
    strategy: DeepSpeedStrategy,
    engine: TrainEngine,
    path: str,
    flag: str,
    rows: Callable[[], Sequence[Any]],
) -> Reference:
    """Return what the model at ``path``, named by ``flag``, says of a batch; see :func:`load_frozen`.

    Where ``engine`` trains adapters on that same model, it is the engine's without them, and nothing is loaded. With
    ``--precompute_ref_log_probs`` it is asked once about all batches of ``rows()``, data sets whose items they
    collate; a model that was loaded is then freed.
    """
    own = config.lora.lora_rank > 0 and Path(path) == Path(config.model.pretrain)
    model = partial(_without_adapter, engine) if own else load_frozen(config, strategy, path, flag, config.ref_offload)
    if not config.precompute_ref_log_probs:
        return partial(answer_log_probs, model)
    known = KnownAnswers()
    for data in rows():
        if len(data):
            known.learn(partial(answer_log_probs, model), data, config.batch, strategy)
    if not own:
        strategy.release(model)
    LOG.info("the reference is asked no more: it said all of %d answers once", len(known))
    return known


def _without_adapter(engine: TrainEngine, *batch: Tensor, **options: Any) -> Any:
    """Return what the model of ``engine`` says without its adapter and without dropout."""
    training = engine.module.training
    engine.eval()
    with engine.module.without_adapter():
        output = engine(*batch, **options)
    if training:
        engine.train()
    return output


@torch.no_grad()
def answer_log_probs(model: nn.Module | Callable[..., Any], batch: TokenBatch) -> Tensor:
    """Return the log-prob ``(B,)`` of each sequence's marked tokens, without a gradient."""
    output = model(batch.sequences, batch.attention_mask, where=batch.loss_mask)
    return masked_sum(output.log_probs, batch.loss_mask, dim=1)


class KnownAnswers:
    """What a model said of answers before it was freed, found again by their tokens. It is a :data:`Reference`."""

    def __init__(self) -> None:
        self._log_probs: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._log_probs)

    def learn(self, ask: Reference, data: Any, batch: BatchConfig, strategy: DeepSpeedStrategy) -> None:
        """Ask about every row of ``data``, each rank about its share, and keep the answers of all ranks."""
        sampler = StepSampler(
            len(data),
            batch.micro_train_batch_size * strategy.data_parallel_size,
            batch.micro_train_batch_size,
            batch.seed,
            rank=strategy.data_parallel_rank,
            world_size=strategy.data_parallel_size,
            shuffle=False,
        )
        found: dict[bytes, float] = {}
        for step in sampler.epoch(0):
            for rows in step:
                asked = data.collate([data[row] for row in rows])
                said = ask(asked.to(strategy.device)).tolist()
                found.update(zip(_keys(asked), said, strict=True))
        for part in strategy.comm.all_gather_object(found):
            self._log_probs.update(part)

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return the log-probs ``(B,)`` float32; a row without marked tokens has 0."""
        marked = batch.loss_mask.any(dim=1).tolist()
        known = [self._log_probs[key] if asked else 0.0 for key, asked in zip(_keys(batch), marked, strict=True)]
        return torch.tensor(known, dtype=torch.float32, device=batch.sequences.device)


def _keys(batch: TokenBatch) -> list[bytes]:
    """Return what tells each row of a batch from others: a hash of its tokens and of which are marked."""
    rows = zip(batch.sequences.cpu(), batch.attention_mask.cpu(), batch.loss_mask.cpu(), strict=True)
    return [_key(tokens[real], marked[real[1:]]) for tokens, real, marked in rows]


def _key(tokens: Tensor, marked: Tensor) -> bytes:
    return blake2b(tokens.numpy().tobytes() + marked.numpy().tobytes(), digest_size=16).digest()
