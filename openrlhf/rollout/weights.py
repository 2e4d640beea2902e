"""A model's weights on their way to an engine: in buckets, so that no step of it holds the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

Weights = list[tuple[str, Tensor]]
"""Some weights, by their Hugging Face names."""
BUCKET_BYTES = 256 * 2**20


def in_buckets(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Weights]:
    """Yield ``weights`` in lists of about ``bucket_bytes``: each ends with the weight that fills it."""
    bucket: Weights = []
    size = 0
    for name, tensor in weights:
        bucket.append((name, tensor))
        size += tensor.nbytes
        if size >= bucket_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def alone(bucket: Weights) -> Weights:
    """Return copies that can be pickled: a view takes all that it is a view of along."""
    return [(name, tensor.clone()) for name, tensor in bucket]
