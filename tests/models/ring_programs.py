"""What the ranks of the ring tests run: log-probs, values and gradients of a batch they share, against one rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openrlhf.models.actor import Actor
from openrlhf.models.backbone import TokenModel, enable_gradient_checkpointing
from openrlhf.models.loading import HEAD
from openrlhf.models.ring import Ring, join_neighbours
from openrlhf.models.value_head import ValueModel
from tests.helpers import tiny_causal_lm, tiny_config

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden": 32}
SINKS = {"head_dim": 16, "num_local_experts": 4, "sliding_window": 4}
ARCHITECTURES = {"qwen2": HEADS, "mistral": {}, "gemma2": {}, "cohere": {}, "gpt2": {}, "gpt_oss": SINKS}
LENGTHS = (11, 2, 23, 5)
"""41 tokens: chunks end inside of sequences, and no ring divides them."""


def sequences(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(3, 320, mask.shape, generator=generator) * mask, mask


def value_model() -> ValueModel:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(tiny_config("qwen2", num_labels=1))
    nn.init.normal_(getattr(model, HEAD).weight)
    return ValueModel(model.eval())


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a sum in which each number of ``output`` has a weight of its own."""
    weights = torch.linspace(-1.0, 1.0, output.numel()).view_as(output)
    (output * weights).sum().backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def differences(
    alone: TokenModel, shared: TokenModel, ring: Ring, read: Callable[[TokenModel], Tensor]
) -> list[float]:
    """Return how far output and gradients of ``shared``, added over the ranks of ``ring``, are from ``alone``'s."""
    shared.share_batches(ring)
    expected, output = read(alone), read(shared)
    plain, parts = gradients(alone, expected), gradients(shared, output)
    found = [float((output - expected).detach().abs().max())]
    # A gradient that should be zero is rounding noise: what it is next to the others counts.
    least = 1e-2 * max(gradient.norm() for gradient in plain.values())
    for name, gradient in plain.items():
        dist.all_reduce(parts[name], group=ring.group)
        found.append(float((parts[name] - gradient).norm() / gradient.norm().clamp(min=least)))
    return found


def every_difference(ring: Ring) -> dict[str, float]:
    """Return the largest difference of every model and way to read it."""
    tokens, mask = sequences()
    found = {}
    for arch, options in ARCHITECTURES.items():
        actor = Actor(tiny_causal_lm(None, arch, **options))
        pair = actor, copy.deepcopy(actor)
        found[arch] = max(differences(*pair, ring, lambda model: model(tokens, mask, temperature=0.7).log_probs))
    for name in ("last", "each"):
        critic = value_model()
        pair = critic, copy.deepcopy(critic)
        found[name] = max(differences(*pair, ring, lambda model, name=name: model(tokens, mask, read=name)))
    actor = Actor(tiny_causal_lm(None, "gpt2"))
    shared = copy.deepcopy(actor)
    enable_gradient_checkpointing(shared)
    shared.train()
    found["checkpointed"] = max(differences(actor, shared, ring, lambda model: model(tokens, mask).log_probs))
    actor = Actor(tiny_causal_lm(None, **HEADS))
    pair, both = (actor, copy.deepcopy(actor)), replace(ring, head_stride=2)
    found["two heads at a time"] = max(differences(*pair, both, lambda model: model(tokens, mask).log_probs))
    return found | few_tokens(ring)


def few_tokens(ring: Ring) -> dict[str, float]:
    """Return the differences where ranks have no token that is read, or none at all."""
    found = {}
    for lengths in ((2,), (3, 1), (2, 1, 1, 1, 1)):
        few = sequences(lengths)
        actor = Actor(tiny_causal_lm(None))
        pair = actor, copy.deepcopy(actor)
        found[f"lengths {lengths}"] = max(differences(*pair, ring, lambda model, few=few: model(*few).log_probs))
    tokens, mask = sequences()
    where = torch.zeros_like(mask[:, 1:])
    where[0, :3] = True
    actor = Actor(tiny_causal_lm(None))
    pair = actor, copy.deepcopy(actor)
    found["one place"] = max(differences(*pair, ring, lambda m: m(tokens, mask, where=where).log_probs))
    return found


def compared(size: int) -> dict[str, float]:
    """Join the ranks, form rings of ``size``, and return the differences that this rank sees."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    return every_difference(join_neighbours(size, 1, timedelta(seconds=60)))
