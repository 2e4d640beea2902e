"""Sums, means and whitening over the true positions of a mask.

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


def masked_mean(x: Tensor, mask: Tensor, dim: Dims = None) -> Tensor:
    """Return the mean of ``x`` over the true positions of ``mask``; 0 where there are none."""
    mask = mask.bool().expand_as(x)
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    mean: Tensor | float | None = None,
    rstd: Tensor | float | None = None,
) -> Tensor:
    """Return ``(x - mean) * rstd`` at the true positions of ``mask`` and 0 elsewhere.

    Args:
        x: values of any shape.
        mask: true where ``x`` counts, broadcastable to ``x``.
        shift_mean: when false, the mean is added back: only the scale changes.
        mean: the mean to remove, e.g. over all ranks; by default that of the true positions.
        rstd: one over the standard deviation; by default from the population variance around ``mean``, at least 1e-8.
    """
    mask = mask.bool()
    if mean is None:
        mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0.0)
    if rstd is None:
        rstd = masked_mean(centred.square(), mask).clamp(min=1e-8).rsqrt()
    whitened = centred * rstd if shift_mean else centred * rstd + mean
    return torch.where(mask, whitened, 0.0)
