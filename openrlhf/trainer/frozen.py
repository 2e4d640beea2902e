"""Models that a supervised trainer only asks: the reference of DPO and KTO, the teacher of distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.datasets.batch import TokenBatch
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.ops.masking import masked_sum
from openrlhf.strategy.deepspeed import DeepSpeedStrategy


def load_frozen(config: Any, strategy: DeepSpeedStrategy, path: str, flag: str, offload: bool) -> Callable[..., Any]:
    """Return the language model at ``path``, named by ``flag``, ready to be called; it never learns.

    ``offload`` keeps its shards in host memory under ZeRO-3. All ranks must call the result equally often.
    """
    model = load_causal_lm(
        path,
        replace(config.model, gradient_checkpointing=False),
        context=partial(strategy.loading_context, train=False),
        flag=flag,
    )
    return strategy.prepare_eval(Actor(model, packing_samples=config.attention.packing_samples), offload=offload)


@torch.no_grad()
def answer_log_probs(model: nn.Module | Callable[..., Any], batch: TokenBatch) -> Tensor:
    """Return the log-prob ``(B,)`` of each sequence's marked tokens, without a gradient."""
    output = model(batch.sequences, batch.attention_mask, where=batch.loss_mask)
    return masked_sum(output.log_probs, batch.loss_mask, dim=1)
