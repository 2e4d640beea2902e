"""What the ranks of the tests of known answers run: a model that says how long each of seven answers is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from openrlhf.config.groups import BatchConfig, DeepSpeedConfig
from openrlhf.datasets.batch import TokenBatch
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.known import KnownAnswers, ask_about, kept_answers
from tests.trainer.gradient_formulas import ROWS, sft_rows

BATCH = BatchConfig(micro_train_batch_size=2)


def lengths(batch: TokenBatch) -> Tensor:
    return batch.loss_mask.sum(dim=1).float()


def starts(folder: str, own_disks: bool) -> list[tuple[int, bool]]:
    """Return of each of three starts how often this rank was asked, and whether all that it knows is right.

    Before the third, the last rank loses its file, which is that of all ranks unless they have ``own_disks``.
    """
    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=0, collective_timeout=60))
    strategy.setup_distributed()
    path = Path(folder) / (f"disk{strategy.rank}" if own_disks else "disk") / "answers"
    data, found = sft_rows(), []
    everything = data.collate(list(range(ROWS)))
    for start in range(3):
        asked = []

        def ask(batch: TokenBatch, asked: list = asked) -> Tensor:
            asked.append(batch)
            return lengths(batch)

        def make(ask=ask) -> KnownAnswers:
            return ask_about([data], ask, BATCH, strategy)

        if start == 2 and strategy.rank == strategy.world_size - 1:
            path.unlink()
        strategy.comm.barrier("the start")
        known, _ = kept_answers(path, "key", strategy.comm, make)
        found.append((len(asked), torch.equal(known(everything), lengths(everything)) and len(known) == ROWS))
    strategy.close()
    return found
