"""Ring attention: neighbouring ranks share every row of tokens, a contiguous chunk each.

Each layer sees the keys and values of the whole row, gathered a few heads at a time; all else of a forward exists for
the own chunk only. This is the context parallelism of Llama 3 (https://arxiv.org/abs/2407.21783, section 3.3.2). In
half precision on a GPU the ring_flash_attn package does it, elsewhere torch. The last rank has the most keys to see.

``R`` ranks of a ring, ``N`` tokens of a row with the few that fill it up, ``n = N / R`` tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from openrlhf.errors import UsageError
from openrlhf.models.packing import PackedBatch, Rows


class Mine(NamedTuple):
    """Which of the wanted tokens of a row lie in the own chunk.

    Attributes:
        span: which of the wanted ones.
        places: ``(M,)`` their places in the chunk.
        counts: how many of the wanted ones each rank has.
    """

    span: slice
    places: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Ring:
    """The ranks that share each row; by default one rank, for which everything is the identity.

    Attributes:
        group: the process group of the ring.
        rank: the own place in it.
        size: how many ranks it has.
        head_stride: so many key-value heads are gathered at a time.
    """

    group: Any = None
    rank: int = 0
    size: int = 1
    head_stride: int = 1

    def share(self, batch: PackedBatch) -> PackedBatch:
        """Return the own chunk of ``batch``; its ``rows`` and ``indices`` stay those of the whole row."""
        if self.size == 1:
            return batch
        missing = -batch.input_ids.shape[1] % self.size
        lengths, starts = batch.rows.lengths, batch.rows.starts
        if missing:  # a last sequence that nobody reads
            lengths, starts = (*lengths, missing), torch.cat([starts, starts[-1:] + missing])
        chunk = sum(lengths) // self.size
        own = slice(self.rank * chunk, (self.rank + 1) * chunk)
        ids, positions = (pad(x, (0, missing))[:, own] for x in (batch.input_ids, batch.position_ids))
        rows = SharedRows(lengths, starts, ring=self)
        return replace(batch, input_ids=ids, position_ids=positions, rows=rows)

    def gather(self, own: list) -> list:
        """Return the items of all ranks, equally many of each, those of the first rank first."""
        if self.size == 1:
            return own
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own, group=self.group)
        return [item for part in parts for item in part]

    def mine(self, wanted: Tensor, chunk: int) -> Mine:
        """Return which of the ascending places ``wanted`` (M,) of a row lie in the own chunk of ``chunk`` tokens."""
        if self.size == 1:
            return Mine(slice(None), wanted, (len(wanted),))
        edges = torch.arange(self.size + 1, device=wanted.device) * chunk
        bounds = torch.searchsorted(wanted, edges).tolist()
        span = slice(bounds[self.rank], bounds[self.rank + 1])
        counts = tuple(end - start for start, end in zip(bounds, bounds[1:]))
        return Mine(span, wanted[span] - self.rank * chunk, counts)

    def join(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Return what all ranks have, ``(sum(counts), ...)`` in their order; ``own`` is ``(counts[rank], ...)``.

        All ranks go on to compute the same loss. Each then gets the gradient of its own part: the sum of the ranks'
        gradients of the weights is the gradient of the loss.
        """
        return own if self.size == 1 or not any(counts) else _Join.apply(own, counts, self)


@dataclass(frozen=True)
class SharedRows(Rows):
    """Where the sequences lie in a row of which each rank of ``ring`` has a chunk."""

    ring: Ring = field(kw_only=True)

    @functools.cached_property
    def parts(self) -> tuple[tuple[int, slice], ...]:
        """For each sequence that reaches into the own chunk: its tokens there, and the places in the row that the
        last of them sees.
        """
        chunk = sum(self.lengths) // self.ring.size
        low, high, start, found = self.ring.rank * chunk, (self.ring.rank + 1) * chunk, 0, []
        for length in self.lengths:
            end = min(start + length, high)
            if end > max(start, low):
                found.append((end - max(start, low), slice(start, end)))
            start += length
        return tuple(found)

    @functools.cached_property
    def flash_parts(self) -> tuple:
        """The same for ring_flash_attn: cumulative and largest lengths of queries and of keys, and which keys."""
        prepare = _ring_flash_attn().llama3_flash_attn_prepare_cu_seqlens
        return prepare(self.starts, causal=True, rank=self.ring.rank, world_size=self.ring.size)


def join_neighbours(size: int, head_stride: int, timeout: timedelta) -> Ring:
    """Make rings of ``size`` consecutive ranks and return that of this rank; all ranks call it."""
    rank = dist.get_rank()
    rings = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in rings]
    return Ring(groups[rank // size], rank % size, size, head_stride)


def attend_over_ring(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, rows: SharedRows
) -> Tensor:
    """Return the attention output ``(1, n, heads, width)`` of the own queries over the keys of the whole row.

    ``attend(query, key, value, sinks)`` is causal attention in which the last query sees the last key.
    """
    groups, stride = query.shape[1] // key.shape[1], rows.ring.head_stride
    both, outputs = torch.cat([key, value], dim=-1), []
    for heads in both.split(stride, dim=1):
        first = len(outputs) * stride * groups
        mine = slice(first, first + heads.shape[1] * groups)
        keys, values = _Gather.apply(heads, rows.ring).split([key.shape[-1], value.shape[-1]], dim=-1)
        queries = query[:, mine].split([count for count, _ in rows.parts], dim=2)
        own = None if sinks is None else sinks[mine]
        parts = zip(queries, rows.parts, strict=True)
        outputs.append(torch.cat([attend(q, keys[:, :, seen], values[:, :, seen], own) for q, (_, seen) in parts], 1))
    return torch.cat(outputs, dim=2)


def flash_over_ring(query: Tensor, key: Tensor, value: Tensor, rows: SharedRows, scale: float, window: int) -> Tensor:
    """Return what :func:`attend_over_ring` does, with ring_flash_attn's kernels; raise ``UsageError`` without them."""
    *lengths, seen = rows.flash_parts
    output = _ring_flash_attn().llama3_flash_attn_varlen_func(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        *lengths,
        heads_k_stride=rows.ring.head_stride,
        local_k_slice=seen,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        group=rows.ring.group,
    )
    return output[None]


def _ring_flash_attn() -> ModuleType:
    try:
        import ring_flash_attn
    except ImportError as error:
        raise UsageError(f"--ring_attn_size on a GPU: {error}; pip install 'openrlhf[ring]'") from error
    return ring_flash_attn


class _Gather(torch.autograd.Function):
    """``(1, heads, n, width)`` of every rank to ``(1, heads, N, width)`` on each; their gradients are added up."""

    @staticmethod
    def forward(ctx, own: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        tokens_first = own.transpose(0, 2).contiguous()
        return _all_gather(tokens_first, ring).transpose(0, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # In half precision the sum over the ranks would be rounded once more than without a ring.
        whole = grad.transpose(0, 2).to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        own = whole.new_empty(whole.shape[0] // ctx.ring.size, *whole.shape[1:])
        dist.reduce_scatter(own, list(whole.chunk(ctx.ring.size)), group=ctx.ring.group)
        return own.to(grad.dtype).transpose(0, 2), None


class _Join(torch.autograd.Function):
    """Parts of different lengths, one behind the other; of the gradient, which all ranks have, the own part."""

    @staticmethod
    def forward(ctx, own: Tensor, counts: tuple[int, ...], ring: Ring) -> Tensor:
        ctx.own = slice(sum(counts[: ring.rank]), sum(counts[: ring.rank + 1]))
        longest = max(counts)
        filled = own.new_zeros(longest, *own.shape[1:])
        filled[: len(own)] = own
        parts = _all_gather(filled, ring).split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own], None, None


def _all_gather(own: Tensor, ring: Ring) -> Tensor:
    whole = own.new_empty(ring.size * own.shape[0], *own.shape[1:])
    dist.all_gather(list(whole.chunk(ring.size)), own, group=ring.group)
    return whole
