"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.errors import DataError


class WeightAverage:
    """``average = beta * average + (1 - beta) * weight``, in float32 on the CPU of the one rank that keeps it.

    All ranks pass their (gathered) weights, because a sharded weight needs all of them.
    """

    def __init__(self, beta: float):
        self.beta = beta
        self.weights: dict[str, Tensor] = {}
        self._keep = False

    def start(self, weights: Iterable[tuple[str, Tensor]], keep: bool) -> None:
        """Begin at ``weights``; the ranks where ``keep`` is false hold nothing."""
        self._keep = keep
        for name, weight in weights:
            if keep:
                self.weights[name] = weight.float() if weight.is_floating_point() else weight

    def follow(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards ``weights`` after an optimizer step."""
        for name, weight in weights:
            if self._keep and weight.is_floating_point():
                self.weights[name].lerp_(weight.float(), 1.0 - self.beta)

    @contextmanager
    def swapped_into(self, model: nn.Module, strategy: Any) -> Iterator[None]:
        """Let ``model`` on the keeping rank have the average as its weights inside the block; all ranks enter it."""
        present: dict[str, Tensor] = {}

        def exchange(name: str, weight: Tensor) -> None:
            present[name] = weight.clone()
            weight.copy_(self.weights[name])

        self._for_each(model, strategy, exchange)
        try:
            yield
        finally:
            self._for_each(model, strategy, lambda name, weight: weight.copy_(present[name]))

    def _for_each(self, model: nn.Module, strategy: Any, action: Callable[[str, Tensor], Any]) -> None:
        """Call ``action(name, whole weight)`` for the averaged weights; writing to a weight changes the model."""
        for name, weight in model.state_dict(keep_vars=True).items():
            with strategy.gather([weight], modifier_rank=0), torch.no_grad():
                if name in self.weights:
                    action(name, weight)

    def save(self, path: Path) -> None:
        """Write the average to ``path``."""
        torch.save(self.weights, path)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote. Raises DataError when it is missing."""
        if not path.is_file():
            raise DataError(f"{path} is missing: the checkpoint was written without --enable_ema")
        self.weights = torch.load(path, weights_only=True)
