"""Weights as flat arrays of bytes, which Ray keeps in shared memory: readers on the same machine copy nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

ALIGNMENT = 64


class Bucket(NamedTuple):
    """Some weights: ``table`` holds (name, dtype, shape), ``data`` their bytes one after the other, each aligned."""

    table: list[tuple[str, torch.dtype, tuple[int, ...]]]
    data: numpy.ndarray


def pack(weights: Iterable[tuple[str, Tensor]]) -> Bucket:
    """Copy ``weights`` into one bucket."""
    pairs = [(name, tensor.detach().cpu().contiguous()) for name, tensor in weights]
    data = numpy.zeros(sum(_room(tensor.nbytes) for _, tensor in pairs), dtype=numpy.uint8)
    offset = 0
    for _, tensor in pairs:
        data[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
        offset += _room(tensor.nbytes)
    return Bucket([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs], data)


def unpack(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a bucket: views into it, only to be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(bucket.data)
    offset = 0
    for name, dtype, shape in bucket.table:
        size = torch.Size(shape).numel() * dtype.itemsize
        yield name, data[offset : offset + size].view(dtype).view(shape)
        offset += _room(size)


def _room(size: int) -> int:
    """Return ``size`` rounded up, so that the next weight starts aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT
