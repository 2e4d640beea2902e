"""Attention over a row of concatenated sequences, plugged into transformers under the name ``openrlhf_unpadded``.

A model that uses it computes nothing for padding. The sequences' lengths travel as the keyword ``unpadded`` of the
model's forward (a :class:`~openrlhf.models.packing.Rows`), so they survive gradient checkpointing. In half precision
on a GPU the kernel is torch's variable-length FlashAttention, or the flash-attn package's where torch has none;
elsewhere it is one causal SDPA call a sequence. Rows that ranks share go through :mod:`openrlhf.models.ring`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from openrlhf.models.packing import Rows
from openrlhf.models.ring import SharedRows, attend_over_ring, flash_over_ring

UNPADDED = "openrlhf_unpadded"
PADDED = "sdpa"
REFUSED = -1
HARMLESS = {"position_ids", "use_cache", "cache_position", "sliding_window", "is_causal", "output_router_logits"}
HALF_TYPES = (torch.float16, torch.bfloat16)
SHORT = 384
"""Up to this length the CPU's float32 kernel, whose backward is far faster, wins over the one of half types."""


class UnpaddedAttentionError(RuntimeError):
    """A model asks the unpadded attention for something it does not do; the load-time check turns it into a reason."""


def plan_mask(*_, mask_function: Callable, local_size: int | None = None, use_vmap: bool = False, **__) -> int:
    """Return what takes the place of a mask: the number of latest tokens a token sees, 0 for all before it.

    transformers calls it in every forward and hands the result to the attention function; it alone knows which layers
    have a window. ``REFUSED`` stands for a mask that is not causal, or whose window does not slide.
    """
    edge = local_size or 2
    query, key = torch.tensor([edge, edge, edge, edge, 0]), torch.tensor([0, 1, edge - 1, edge, 1])
    expected = (key <= query) & ((key > query - edge) if local_size else True)
    zero = torch.tensor(0)
    if use_vmap or not torch.equal(mask_function(zero, zero, query, key).cpu(), expected):
        return REFUSED
    return local_size or 0


def unpadded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    unpadded: Rows | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Return the attention output ``(1, N, heads, width)``; queries are ``(1, heads, N, width)``, a row of sequences.

    Args:
        module: the attention layer that asks.
        attention_mask: what :func:`plan_mask` returned.
        scaling: factor of the scores; ``width ** -0.5`` by default.
        dropout: probability of dropping an attention weight.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: ``(heads,)`` logits of attention sinks.
        unpadded: where the sequences lie.
    """
    given = (name for name, argument in others.items() if argument is not None and argument is not False)
    unknown = sorted(name for name in given if name not in HARMLESS)
    if unknown:
        raise UnpaddedAttentionError(f"its attention takes {', '.join(unknown)}")
    if unpadded is None or not isinstance(attention_mask, int):
        raise UnpaddedAttentionError("it does not pass the lengths of the sequences down to its attention")
    if attention_mask == REFUSED:
        raise UnpaddedAttentionError("its attention mask is neither causal nor a sliding window")
    window = 0 if attention_mask >= unpadded.longest else attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if unpadded.keys:
        key, value = (x.index_select(2, unpadded.keys.places) for x in (key, value))
    shared = isinstance(unpadded, SharedRows)
    kernel = _variable_length_kernel(query, value, shared, dropout, softcap, s_aux)
    if kernel is not None:
        return kernel(query, key, value, unpadded, scale, window), None

    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = s_aux) -> Tensor:
        if softcap is None and sinks is None:
            return _one_sequence(query, key, value, scale, window, dropout)
        return _one_sequence_explicit(query, key, value, scale, window, dropout, softcap, sinks)

    if shared:
        return attend_over_ring(attend, query, key, value, s_aux, unpadded), None
    seen = (unpadded.keys or unpadded).lengths
    parts = zip(query.split(unpadded.lengths, dim=2), key.split(seen, dim=2), value.split(seen, dim=2), strict=True)
    return torch.cat([attend(*part) for part in parts], dim=1), None


def _one_sequence(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    """Return ``(1, L, heads, width)``: causal SDPA of the last ``L`` tokens of one sequence.

    A mask exists only where a window cuts, or where there are many more keys than queries; a few queries that nobody
    reads are cheaper than one.
    """
    queries, keys, dtype = query.shape[2], key.shape[2], query.dtype
    if not 0 < window < keys and queries < keys < 2 * queries:
        query = F.pad(query, (0, 0, keys - queries, 0))
        output = _one_sequence(query, key, value, scale, window, dropout)
        return output[:, keys - queries :]
    if query.device.type == "cpu" and dtype in HALF_TYPES and keys <= SHORT:
        query, key, value = query.float(), key.float(), value.float()
    mask = _visible(queries, keys, window, query.device) if 0 < window < keys or queries < keys else None
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output.transpose(1, 2).to(dtype)


def _one_sequence_explicit(query, key, value, scale, window, dropout, softcap, s_aux) -> Tensor:
    """Return ``(1, L, heads, width)`` with the scores spelled out: for soft-capped scores and attention sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(query.shape[2], key.shape[2], window, query.device)
    scores = scores.float().masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(1, -1, query.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(query.dtype)
    return (F.dropout(weights, p=dropout) @ value).transpose(1, 2)


def _visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return ``(queries, keys)`` bool: true where a query sees a key. The queries are those of the last keys."""
    before = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return mask.triu(before + 1 - window) if window else mask


def _variable_length_kernel(
    query: Tensor, value: Tensor, shared: bool, dropout: float, softcap, s_aux
) -> Callable | None:
    """Return the GPU kernel for these inputs, or None where one SDPA call a sequence has to do."""
    fits = query.is_cuda and query.dtype in HALF_TYPES and query.shape[-1] == value.shape[-1] <= 256
    if not fits or dropout or softcap is not None or s_aux is not None:
        return None
    return flash_over_ring if shared else _torch_kernel() or _flash_attn_kernel()


def _bounds(rows: Rows) -> tuple[Tensor, Tensor, int, int]:
    """Return where queries and keys of the sequences start, and the most of each."""
    return rows.starts, (rows.keys or rows).starts, max(rows.lengths), rows.longest


@functools.cache
def _flash_attn_kernel() -> Callable | None:
    """Return flash-attn's variable-length kernel when that package is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    def run(query, key, value, rows: Rows, scale: float, window: int) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        output = flash_attn_varlen_func(
            query, key, value, *_bounds(rows), softmax_scale=scale, causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
        )  # fmt: skip
        return output[None]

    return run


@functools.cache
def _torch_kernel() -> Callable | None:
    """Return torch's variable-length kernel when this torch has one that takes all we pass."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    if not takes(varlen_attn, "scale", "window_size", "enable_gqa"):
        return None

    def run(query, key, value, rows: Rows, scale: float, window: int) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        output = varlen_attn(
            query, key, value, *_bounds(rows), scale=scale,
            window_size=(window - 1 if window else -1, 0), enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return output[None]

    return run


def takes(function: Callable, *names: str) -> bool:
    """Return whether ``function`` has parameters of these names."""
    return set(names) <= set(inspect.signature(function).parameters)


@functools.cache
def register() -> None:
    """Make ``openrlhf_unpadded`` known to transformers; a second call does nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(UNPADDED, unpadded_attention)
    AttentionMaskInterface.register(UNPADDED, plan_mask)


def switch_attention(model: torch.nn.Module, name: str) -> bool:
    """Set the attention implementation of a transformers ``model``; return whether the model really took it."""
    if model.config._attn_implementation == name:
        return True
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError):
        return False
    return model.config._attn_implementation == name
