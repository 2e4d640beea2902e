"""The load-balancing loss of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Return ``E * sum over experts of (share of choices) * (mean probability)``: ``top_k`` when all are used alike.

    The shares and the means are taken over the tokens of all layers together (Switch Transformer,
    https://arxiv.org/abs/2101.03961, equations 4-6, for ``top_k`` choices a token).

    Args:
        router_logits: one ``(N, E)`` tensor a layer: N tokens, E experts, before the soft-max.
        top_k: experts that a token is sent to.
    """
    probabilities = torch.softmax(torch.cat(list(router_logits)).float(), dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    experts = probabilities.shape[-1]
    shares = torch.zeros_like(probabilities).scatter(1, chosen, 1.0).mean(dim=0)
    return experts * (shares.detach() * probabilities.mean(dim=0)).sum()
