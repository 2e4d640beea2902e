"""Sums behind the logged means: kept on the device, joined over ranks once, remembered between log lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from openrlhf.strategy.comm import Comm


class Mean(NamedTuple):
    """A mean that can still be joined with others: ``total`` over ``count`` tokens, pairs or rows."""

    total: float
    count: float

    @property
    def value(self) -> float:
        """``total / count``; NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")


def divergence(mean: Mean, device: torch.device) -> Tensor:
    """Return a mean of log-ratios as the scalar that a loss takes for a divergence: not below 0.

    What is not finite becomes NaN and so reaches the loss: the step then stops before the weights change.
    """
    return torch.tensor(max(0.0, mean.value) if math.isfinite(mean.value) else math.nan, device=device)


class MetricSums:
    """Named ``(sum, count)`` pairs of this rank, added up in float64 without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]], counted: bool = True) -> None:
        """Add one micro-batch; each value is a pair of scalars. One that is not ``counted`` only gives its names."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().double().reshape(()), count.detach().double().reshape(())])
            self._add(name, pair if counted else torch.zeros_like(pair))

    def join(self, other: MetricSums) -> None:
        """Add what ``other`` holds."""
        for name, pair in other._sums.items():
            self._add(name, pair)

    def _add(self, name: str, pair: Tensor) -> None:
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self, comm: Comm) -> dict[str, Mean]:
        """Return the sums over all ranks with one all-reduce and one wait; all ranks must have the same names."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        joined = comm.all_reduce(torch.stack([self._sums[name] for name in names])).tolist()
        return {name: Mean(*pair) for name, pair in zip(names, joined, strict=True)}


class MeanWindow:
    """Means over the steps since the last log line, e.g. ``loss_mean``; its state survives a restart."""

    def __init__(self, names: Mapping[str, str]):
        """``names`` maps a metric to the name of its mean over the window."""
        self._names = dict(names)
        self._means: dict[str, Mean] = {}

    def add(self, step: Mapping[str, Mean]) -> dict[str, float]:
        """Add one step and return the means over the window so far, under their window names."""
        for name in self._names:
            seen = self._means.get(name, Mean(0.0, 0.0))
            self._means[name] = Mean(seen.total + step[name].total, seen.count + step[name].count)
        return {window: self._means[name].value for name, window in self._names.items()}

    def clear(self) -> None:
        """Start a new window."""
        self._means = {}

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums so far; floats survive JSON exactly."""
        return {name: list(mean) for name, mean in self._means.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._means = {name: Mean(*pair) for name, pair in state.items()}
