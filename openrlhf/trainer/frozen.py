"""Models that a supervised trainer only asks: the reference of DPO and KTO, the teacher of distillation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.datasets.batch import TokenBatch
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.models.actor import Actor
from openrlhf.models.identity import model_identity
from openrlhf.models.loading import load_causal_lm
from openrlhf.ops.masking import masked_sum
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import TrainEngine
from openrlhf.trainer.known import KnownAnswers, Reference, ask_about, kept_answers
from openrlhf.trainer.setup import frozen_line

LOG = logging.getLogger(__name__)
ANSWERS = "reference.answers"
"""The file of a run folder that keeps what the reference said."""


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
    asked_about: Callable[[], Sequence[Any]],
    folder: Path | None = None,
) -> Reference:
    """Return what the model at ``path``, named by ``flag``, says of a batch; see :func:`load_frozen`.

    Where ``engine`` trains adapters on that same model, it is the engine's without them, and nothing is loaded. With
    ``--precompute_ref_log_probs`` the model is asked once about all batches of ``asked_about()``, data sets whose
    items they collate, and freed. What it said is kept in ``folder``: a run that goes on asks it no more.
    """
    own = config.lora.lora_rank > 0 and Path(path) == Path(config.model.pretrain)

    def load() -> Callable[..., Any]:
        if own:
            return partial(without_adapter, engine)
        return load_frozen(config, strategy, path, flag, config.ref_offload)

    if not config.precompute_ref_log_probs:
        return partial(answer_log_probs, load())
    sets = [data for data in asked_about() if len(data)]

    def ask() -> KnownAnswers:
        model = load()
        known = ask_about(sets, partial(answer_log_probs, model), config.batch, strategy)
        if not own:
            strategy.release(model)
        return known

    key = folder and _answers_key(config, strategy, path, sets)
    known, kept = kept_answers(folder / ANSWERS, key, strategy.comm, ask) if key else (ask(), False)
    said = "what it said of %d answers is in the run folder" if kept else "it said all of %d answers once"
    LOG.info(f"the reference is asked no more: {said}", len(known))
    return known


def _answers_key(config: Any, strategy: DeepSpeedStrategy, path: str, sets: Sequence[Any]) -> str | None:
    """Return a hash of all that the answers of the model at ``path`` depend on; None where that cannot be known."""
    # A model may be large: one rank reads it.
    identity = strategy.comm.broadcast_object(model_identity(path) if strategy.rank == 0 else None)
    if identity is None:
        return None
    settings = (config.model.bf16, config.lora.load_in_4bit, config.attention.packing_samples)
    parts = (identity, settings, version("torch"), version("transformers"), *map(fingerprint, sets))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def without_adapter(engine: TrainEngine, *batch: Tensor, **options: Any) -> Any:
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
