"""The optimizer step that numbers which are not finite cannot pass: it stops the run, or is left out.

A loss or a gradient that is not finite on one rank makes the gradient of all ranks so; the engine then refuses the
step everywhere, and the weights stay those of the step before. What is added here is which rows it came from, and for
how long such steps are forgiven.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from openrlhf.errors import NumericError
from openrlhf.strategy.comm import Comm
from openrlhf.strategy.engine import StepResult, TrainEngine

LOG = logging.getLogger(__name__)
SHOWN_ROWS = 64
WAY_ON = "the weights were not changed. Look at these, lower the learning rate, or allow --max_skipped_steps"


class StepGuard:
    """Takes the optimizer steps of an engine. All ranks call it and come to the same end.

    Args:
        engine: what learns.
        comm: its ranks.
        max_skipped: so many steps in a row may be left out before the run stops. The count starts anew at a resume.
        noun: what the numbers of rows count, with a place for them: ``samples {}``.

    Attributes:
        skipped: steps left out since the guard was made.
    """

    def __init__(self, engine: TrainEngine, comm: Comm, max_skipped: int, noun: str):
        self._engine, self._comm = engine, comm
        self._max_skipped, self._noun = max_skipped, noun
        self._in_a_row = 0
        self.skipped = 0

    def step(
        self, name: str, rows: Sequence[list[int]], losses: Sequence[Tensor], again: Sequence[Callable[[], Tensor]]
    ) -> StepResult | None:
        """Take the step that the backwards prepared, or return None when it was left out.

        Args:
            name: of the step, for messages.
            rows: numbers of the rows of each micro-batch of this rank.
            losses: of each micro-batch, scalars.
            again: computes the loss of each micro-batch once more, with its graph.

        Raises:
            NumericError: the loss or the gradient is not finite, and no more steps may be left out.
        """
        try:
            result = self._engine.step()
        except NumericError as error:
            last = self._in_a_row >= self._max_skipped
            # A step that is left out must leave no gradient behind, so nothing is computed again.
            reason, found = self._explain(str(error), rows, losses, again if last else ())
            if last:
                before = f", after {self._in_a_row} steps that --max_skipped_steps left out" if self._in_a_row else ""
                raise NumericError(f"{name}: {reason}{before}; {WAY_ON}", found) from error
            self._in_a_row += 1
            self.skipped += 1
            if self._comm.rank == 0:
                LOG.warning("%s is left out: %s", name, reason)
            return None
        self._in_a_row = 0
        return result

    def _explain(
        self,
        refusal: str,
        rows: Sequence[list[int]],
        losses: Sequence[Tensor],
        again: Sequence[Callable[[], Tensor]],
    ) -> tuple[str, list[int]]:
        """Return what was wrong with the step, in words, and the rows of all ranks that it came from."""
        found = self._gather(rows, (not torch.isfinite(loss) for loss in losses))
        if found:
            return f"the loss is not finite in the micro-batches of {self._named(found)}", found
        found = self._gather(rows, self._engine.find_poison(again)) if again else []
        if found:
            return f"{refusal} because of the micro-batches of {self._named(found)}", found
        found = self._gather(rows, [True] * len(rows))
        return f"{refusal} in a step over {self._named(found)}", found

    def _gather(self, rows: Sequence[list[int]], wanted: Iterable[bool]) -> list[int]:
        """Return the rows of the wanted micro-batches of all ranks, in ascending order."""
        here = [row for micro, take in zip(rows, wanted, strict=True) if take for row in micro]
        return sorted({row for found in self._comm.all_gather_object(here) for row in found})

    def _named(self, rows: Sequence[int]) -> str:
        """Return ``samples [3, 7]``; only the first rows of very many."""
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        return self._noun.format(f"{list(rows[:SHOWN_ROWS])}{more}")
