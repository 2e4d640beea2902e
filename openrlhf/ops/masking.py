"""Sums and whitening over the true positions of a mask.

Everything selects with ``torch.where`` before any arithmetic: a NaN or an infinity at a masked position never reaches
the result or the gradient, as ``NaN * 0`` would.
"""

from __future__ import annotations

import torch
from torch import Tensor

Dims = int | tuple[int, ...] | None


def masked_sum(x: Tensor, mask: Tensor, dim: Dims = None) -> Tensor:
    """Return the sum of ``x`` over the true positions of ``mask``, over all dimensions or over ``dim``."""
    kept = torch.where(mask.bool(), x, 0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``x`` (B, T) over the true positions of each row of ``mask``, ``(B,)``; 0 in an empty row."""
    return masked_sum(x, mask, dim=-1) / mask.sum(dim=-1).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, mean: float, rstd: float) -> Tensor:
    """Return ``(x - mean) * rstd`` at the true positions of ``mask`` and 0 elsewhere.

    Args:
        x: values of any shape.
        mask: true where ``x`` counts, broadcastable to ``x``.
        mean: what to remove, e.g. the mean over all ranks.
        rstd: one over the standard deviation.
    """
    return torch.where(mask.bool(), (x - mean) * rstd, 0.0)
