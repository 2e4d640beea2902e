"""How experiences are dealt into optimizer steps and micro-batches."""

from __future__ import annotations

from dataclasses import replace

import torch

from openrlhf.config.groups import BatchConfig
from openrlhf.rollout.types import Experience
from openrlhf.strategy.comm import SoloComm
from openrlhf.trainer.ppo.buffer import ExperienceBuffer, blank_experience, concatenate


class FixedComm(SoloComm):
    """A rank among several whose sums and maxima are known beforehand."""

    def __init__(self, rank: int, rows: int, most_micro_batches: int):
        self.rank, self._rows, self._most = rank, rows, most_micro_batches

    def all_reduce(self, value, op="sum"):
        return float(self._rows) if op == "sum" else float(self._most)


def numbered(start: int, lengths: list[int]) -> Experience:
    """Return an experience whose row ``i`` has the given length and holds the token ``start + i``."""
    rows, width = len(lengths), max(lengths)
    attended = torch.arange(width) < torch.tensor(lengths)[:, None]
    sequences = torch.arange(start, start + rows)[:, None] * attended
    mask = attended[:, 1:]
    scalar = {name: mask.float() for name in ("rollout_log_probs", "log_probs", "ref_log_probs", "kl", "values")}
    return Experience(
        sequences=sequences,
        attention_mask=attended,
        action_mask=mask,
        sample=torch.arange(start, start + rows),
        scores=torch.arange(start, start + rows).float(),
        advantages=mask.float(),
        returns=mask.float(),
        **scalar,
    )


def rows_of(step: list[Experience]) -> list[int]:
    return [int(score) for micro in step for score in micro.scores if micro.action_mask.any()]


def test_every_row_is_seen_once_a_pass_in_equal_steps():
    shards = [numbered(0, [3, 5, 4]), numbered(3, [2, 6, 3, 3, 4])]
    buffer = ExperienceBuffer(shards, SoloComm(), BatchConfig(train_batch_size=4, micro_train_batch_size=3), 1)
    steps = [rows_of(step) for step in buffer.epoch(0)]
    assert [len(step) for step in steps] == [4, 4]
    assert sorted(steps[0] + steps[1]) == list(range(8))


def test_the_order_depends_on_seed_rollout_and_pass_alone():
    def order(seed: int, rollout: int, epoch: int) -> list[int]:
        batch = BatchConfig(train_batch_size=16, micro_train_batch_size=16, seed=seed)
        buffer = ExperienceBuffer([numbered(0, [3] * 16)], SoloComm(), batch, rollout)
        return [row for step in buffer.epoch(epoch) for row in rows_of(step)]

    assert order(1, 1, 0) == order(1, 1, 0)
    assert len({tuple(order(*key)) for key in [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1)]}) == 4


def test_a_short_rollout_still_makes_one_step():
    batch = BatchConfig(train_batch_size=128, micro_train_batch_size=2)
    steps = list(ExperienceBuffer([numbered(0, [3, 4, 5])], SoloComm(), batch, 1).epoch(0))
    assert len(steps) == 1
    assert sorted(rows_of(steps[0])) == [0, 1, 2]


def test_a_rank_that_runs_out_of_rows_gets_weightless_micro_batches():
    comm = FixedComm(rank=1, rows=5, most_micro_batches=2)
    batch = BatchConfig(train_batch_size=8, micro_train_batch_size=2)
    (step,) = ExperienceBuffer([numbered(0, [3])], comm, batch, 1).epoch(0)
    assert [int(micro.action_mask.sum()) for micro in step] == [2, 0]
    (empty,) = ExperienceBuffer([numbered(0, [3]).select([])], comm, batch, 1).epoch(0)
    assert [int(micro.action_mask.sum()) for micro in empty] == [0, 0]


def test_two_ranks_with_few_rows_do_not_leave_a_step_empty():
    batch = BatchConfig(train_batch_size=1, micro_train_batch_size=1)
    ranks = [ExperienceBuffer([numbered(r, [3])], FixedComm(r, 2, 1), batch, 1) for r in range(2)]
    steps = [[row for rank in ranks for row in rows_of(list(rank.epoch(0))[number])] for number in range(2)]
    assert sorted(len(step) for step in steps) == [1, 1]


def test_a_budget_of_tokens_is_kept_and_every_row_is_seen_once():
    lengths = [3, 9, 4, 2, 8, 5, 12, 3]
    batch = BatchConfig(train_batch_size=8, micro_train_batch_size=1, use_dynamic_batch=True)
    batch = replace(batch, train_max_tokens_per_gpu=10)
    (step,) = ExperienceBuffer([numbered(0, lengths)], SoloComm(), batch, 1).epoch(0)
    sums = [int(micro.attention_mask.sum()) for micro in step]
    assert sums == sorted(sums, reverse=True) and len(step) == 5
    assert all(total <= 10 or len(micro) == 1 for micro, total in zip(step, sums, strict=True))
    assert sorted(rows_of(step)) == list(range(8))


def test_ranks_that_cut_by_tokens_have_equally_many_micro_batches():
    batch = BatchConfig(train_batch_size=8, use_dynamic_batch=True, train_max_tokens_per_gpu=10)
    comm = FixedComm(rank=1, rows=5, most_micro_batches=3)
    (step,) = ExperienceBuffer([numbered(0, [3, 4])], comm, batch, 1).epoch(0)
    assert [int(micro.action_mask.sum()) for micro in step] == [5, 0, 0]


def test_concatenation_pads_on_the_right_and_selection_cuts_it_off_again():
    joined = concatenate([numbered(1, [2, 3]), numbered(3, [5])])
    assert joined.sequences.tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 0, 0], [3, 3, 3, 3, 3]]
    assert joined.select([1]).sequences.tolist() == [[2, 2, 2]]
    assert joined.select([1]).advantages.shape == (1, 2)


def test_the_blank_experience_has_no_actions():
    assert not blank_experience().action_mask.any()
