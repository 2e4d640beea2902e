"""Removing the padding before a forward and putting it back after.

``B`` sequences, ``S`` padded length, ``T = S - 1``, ``N`` real tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from openrlhf.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Where the sequences lie in one row of concatenated tokens; handed down to the attention function.

    Attributes:
        lengths: tokens of each sequence, none of them 0; a last one may be filler.
        starts: ``(len(lengths) + 1,)`` int32 on the device of the tokens, the cumulative lengths from 0.
    """

    lengths: tuple[int, ...]
    starts: Tensor

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths)


@dataclass(frozen=True)
class PackedBatch:
    """A batch without its padding.

    Attributes:
        input_ids: ``(1, M)`` int64; ``M >= N``, what is beyond ``N`` is filler that nobody reads.
        position_ids: ``(1, M)`` int64, starting at 0 in every sequence.
        rows: where the sequences lie.
        indices: ``(N,)`` int64, the place of each real token in the flattened ``(B, S)``.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Rows
    indices: Tensor


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Return the ``(B, S)`` position of every real token in its own sequence, 0 on padding of either side."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_(min=0)


def remove_padding(sequences: Tensor, attention_mask: Tensor, multiple: int = 1) -> PackedBatch:
    """Concatenate the real tokens of ``sequences`` (B, S) into one row; rows without a real token vanish.

    A last sequence of filler makes the length of the row a ``multiple``.

    Raises:
        DataError: there is no real token at all.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    indices = mask.flatten().nonzero().squeeze(-1)
    if len(indices) == 0:
        raise DataError("a batch without a single token reached the model: its attention mask is false everywhere")
    input_ids, position_ids = sequences.flatten()[indices], position_ids_of(mask).flatten()[indices]
    lengths = lengths[lengths > 0]
    filler = -len(indices) % multiple
    if filler:
        input_ids = pad(input_ids, (0, filler))
        position_ids = torch.cat([position_ids, torch.arange(filler, device=mask.device)])
        lengths = pad(lengths, (0, 1), value=filler)
    starts = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return PackedBatch(input_ids[None], position_ids[None], Rows(tuple(lengths.tolist()), starts), indices)


def restore(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a zero tensor of ``shape`` with ``values`` (M,) at the flattened ``indices`` (M,); differentiable."""
    return values.new_zeros(shape[0] * shape[1]).scatter(0, indices, values).view(shape)


def predicted_places(attention_mask: Tensor) -> Tensor:
    """Return ``(B, T)`` bool: true where both a token and the one that follows it are real."""
    mask = attention_mask.bool()
    return mask[:, :-1] & mask[:, 1:]
