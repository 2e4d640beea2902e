"""Removing the padding before a forward and putting it back after, and computing what sequences begin with once.

``B`` sequences, ``S`` padded length, ``T = S - 1``, ``N`` real tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from openrlhf.errors import DataError

LEAST_SHARED = 4
"""Fewer tokens that sequences begin with are computed again."""
WORTH_SHARING = 1 / 16
"""A smaller part of a batch that could be left out is computed all the same."""


@dataclass(frozen=True)
class Keys:
    """What the sequences see of a row that holds their common beginnings once.

    Attributes:
        places: ``(K,)`` int64, the places in the row of the tokens of every whole sequence, one after the other.
        lengths: tokens of each whole sequence.
        starts: ``(len(lengths) + 1,)`` int32, the cumulative lengths from 0.
    """

    places: Tensor
    lengths: tuple[int, ...]
    starts: Tensor


@dataclass(frozen=True)
class Rows:
    """Where the sequences lie in one row of concatenated tokens; handed down to the attention function.

    Attributes:
        lengths: tokens of each sequence, none of them 0; a last one may be filler.
        starts: ``(len(lengths) + 1,)`` int32 on the device of the tokens, the cumulative lengths from 0.
        keys: where sequences begin alike, the row holds of all but one of them their own end only, which ``lengths``
            and ``starts`` are about; these are the whole ones. None where the row holds every token.
    """

    lengths: tuple[int, ...]
    starts: Tensor
    keys: Keys | None = None

    @property
    def longest(self) -> int:
        """Length of the longest whole sequence."""
        return max((self.keys or self).lengths)


@dataclass(frozen=True)
class PackedBatch:
    """A batch without its padding.

    Attributes:
        input_ids: ``(1, M)`` int64; ``M >= N`` but for beginnings that are left out; filler that nobody reads is last.
        position_ids: ``(1, M)`` int64, starting at 0 in every sequence.
        rows: where the sequences lie.
        indices: ``(N,)`` int64, the place of each real token in the flattened ``(B, S)``.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Rows
    indices: Tensor

    def whole(self, values: Tensor) -> Tensor:
        """Return ``values`` (M, ...) of the row's tokens for all tokens of the sequences, filler behind them."""
        keys = self.rows.keys
        return values if keys is None else values.index_select(0, keys.places)


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Return the ``(B, S)`` position of every real token in its own sequence, 0 on padding of either side."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_(min=0)


def remove_padding(
    sequences: Tensor, attention_mask: Tensor, multiple: int = 1, least_shared: int | None = None
) -> PackedBatch:
    """Concatenate the real tokens of ``sequences`` (B, S) into one row; rows without a real token vanish.

    A last sequence of filler makes the length of the row a ``multiple``. With ``least_shared`` so many tokens or more
    that several sequences begin with are in the row once, if that leaves out enough of the batch.

    Raises:
        DataError: there is no real token at all.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    indices = mask.flatten().nonzero().squeeze(-1)
    if len(indices) == 0:
        raise DataError("a batch without a single token reached the model: its attention mask is false everywhere")
    input_ids, position_ids = sequences.flatten()[indices], position_ids_of(mask).flatten()[indices]
    whole = own = tuple(lengths[lengths > 0].tolist())
    places = None
    if least_shared is not None:
        shared, places = common_beginnings(input_ids, whole, least_shared)
    if places is not None:
        own = tuple(length - less for length, less in zip(whole, shared, strict=True))
        kept = position_ids >= torch.tensor(shared, device=mask.device).repeat_interleave(lengths[lengths > 0])
        input_ids, position_ids = input_ids[kept], position_ids[kept]
    filler = -len(input_ids) % multiple
    if filler:
        row = torch.arange(len(input_ids), len(input_ids) + filler, device=mask.device)
        places = None if places is None else torch.cat([places, row])
        input_ids, position_ids = pad(input_ids, (0, filler)), torch.cat([position_ids, row - row[0]])
        whole, own = (*whole, filler), (*own, filler)
    keys = None if places is None else Keys(places, whole, _starts(whole, mask.device))
    return PackedBatch(input_ids[None], position_ids[None], Rows(own, _starts(own, mask.device), keys), indices)


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).to(torch.int32)


def common_beginnings(tokens: Tensor, lengths: Sequence[int], least: int) -> tuple[list[int], Tensor | None]:
    """Return how many tokens each sequence begins with that another has already, and where all its tokens then lie.

    Sequences that begin alike are neighbours once they are sorted, so each follows the one before it. At least one
    token stays its own.

    Args:
        tokens: ``(N,)`` int64, the sequences one after the other.
        lengths: of each.
        least: fewer tokens are not worth it.

    Returns:
        The number for each sequence, and ``(N,)`` int64, for each token its place in a row without those that are
        there already; None instead where it is hardly shorter.
    """
    sequences = tokens.cpu().split(list(lengths))
    order = sorted(range(len(lengths)), key=lambda index: sequences[index].tolist())
    shared = [0] * len(lengths)
    for before, index in zip(order, order[1:]):
        both = min(lengths[before], lengths[index] - 1)
        different = (sequences[before][:both] != sequences[index][:both]).nonzero()
        alike = int(different[0]) if len(different) else both
        shared[index] = alike if alike >= least else 0
    if sum(shared) < len(tokens) * WORTH_SHARING:
        return shared, None
    own = [length - less for length, less in zip(lengths, shared, strict=True)]
    ends = list(torch.arange(sum(own)).split(own))
    places = dict.fromkeys(order[:1], ends[order[0]])
    for before, index in zip(order, order[1:]):
        places[index] = torch.cat([places[before][: shared[index]], ends[index]])
    return shared, torch.cat([places[index] for index in range(len(lengths))]).to(tokens.device)


def restore(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a zero tensor of ``shape`` with ``values`` (M,) at the flattened ``indices`` (M,); differentiable."""
    return values.new_zeros(shape[0] * shape[1]).scatter(0, indices, values).view(shape)


def predicted_places(attention_mask: Tensor) -> Tensor:
    """Return ``(B, T)`` bool: true where both a token and the one that follows it are real."""
    mask = attention_mask.bool()
    return mask[:, :-1] & mask[:, 1:]
