"""How the rows of a data set are dealt to the ranks of a run and to their micro-batches, as its flags say."""

from __future__ import annotations

from typing import Any

from openrlhf.config.groups import BatchConfig
from openrlhf.datasets.sampler import StepSampler
from openrlhf.strategy.deepspeed import DeepSpeedStrategy


def sampler_of(
    batch: BatchConfig, strategy: DeepSpeedStrategy, n_rows: int, rows_per_step: int, **order: Any
) -> StepSampler:
    """Return what deals ``n_rows`` rows to this rank; ``order`` is what else :class:`StepSampler` takes."""
    budget = batch.max_tokens_per_gpu
    return StepSampler(
        n_rows,
        rows_per_step,
        batch.micro_train_batch_size,
        batch.seed,
        rank=strategy.data_parallel_rank,
        world_size=strategy.data_parallel_size,
        max_tokens=None if budget is None else budget * strategy.ring.size,
        **order,
    )


def in_order(data: Any, n_rows: int, batch: BatchConfig, strategy: DeepSpeedStrategy) -> StepSampler:
    """Return what deals the first ``n_rows`` of ``data`` once, unshuffled, for forwards without gradients.

    A step is one micro-batch a rank; with a budget of tokens it has as many rows as an optimizer step, dealt by their
    ``data.lengths``.
    """
    if batch.use_dynamic_batch:
        lengths = data.lengths[:n_rows]
        return sampler_of(batch, strategy, n_rows, batch.train_batch_size, shuffle=False, lengths=lengths)
    return sampler_of(
        batch, strategy, n_rows, batch.micro_train_batch_size * strategy.data_parallel_size, shuffle=False
    )
