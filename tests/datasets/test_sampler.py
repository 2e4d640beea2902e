import numpy as np
import pytest

from openrlhf.datasets.sampler import StepSampler
from openrlhf.errors import DataError


def rows_by_step(n_rows, train, micro, world, seed=1, epoch=0, **options):
    """Return, for every step, the micro-batches of every rank."""
    ranks = [list(StepSampler(n_rows, train, micro, seed, r, world, **options).epoch(epoch)) for r in range(world)]
    return list(zip(*ranks, strict=True))


def flat(step):
    return sorted(row for rank in step for micro in rank for row in micro)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_union_over_steps_and_ranks_is_every_row_once(world, micro):
    steps = rows_by_step(53, 16, micro, world)
    assert sorted(row for step in steps for row in flat(step)) == list(range(53))


@pytest.mark.parametrize("lengths", [None, [(7 * row) % 31 for row in range(53)]])
def test_the_rows_of_a_step_do_not_depend_on_ranks_micro_batches_or_lengths(lengths):
    reference = [flat(step) for step in rows_by_step(53, 16, 4, 1)]
    for world, micro in [(1, 1), (2, 4), (3, 2), (4, 8)]:
        assert [flat(step) for step in rows_by_step(53, 16, micro, world, lengths=lengths)] == reference


@pytest.mark.parametrize("n_rows", [1, 5, 17, 33])
def test_every_rank_gets_the_same_number_of_micro_batches(n_rows):
    for step in rows_by_step(n_rows, 16, 3, 4):
        assert len({len(rank) for rank in step}) == 1
        assert all(len(micro) <= 3 for rank in step for micro in rank)


def test_a_rank_without_rows_runs_empty_micro_batches():
    (step,) = rows_by_step(2, 16, 2, 4)
    assert step[2:] == ([[]], [[]])


def test_an_epoch_has_ceil_of_rows_over_batch_steps():
    assert StepSampler(10, 4, 2, seed=0).steps_per_epoch == 3
    assert [len(flat(step)) for step in rows_by_step(10, 4, 2, 1)] == [4, 4, 2]


def test_epochs_and_seeds_give_different_orders_and_repeat():
    sampler = StepSampler(64, 64, 64, seed=3)
    first, second = next(sampler.epoch(0)), next(sampler.epoch(1))
    assert first != second
    assert next(StepSampler(64, 64, 64, seed=3).epoch(0)) == first
    assert next(StepSampler(64, 64, 64, seed=4).epoch(0)) != first


def test_a_resumed_epoch_continues_with_the_same_steps():
    sampler = StepSampler(50, 8, 2, seed=0, rank=1, world_size=2)
    assert list(sampler.epoch(2, start_step=3)) == list(sampler.epoch(2))[3:]


def test_without_shuffling_the_order_is_that_of_the_data():
    assert list(StepSampler(5, 2, 2, seed=0, shuffle=False).epoch(0)) == [[[0, 1]], [[2, 3]], [[4]]]


def test_lengths_give_the_micro_batches_of_a_step_like_many_tokens():
    lengths = [1, 90, 2, 91, 3, 92, 4, 93]
    (step,) = StepSampler(8, 8, 2, seed=5, lengths=lengths).epoch(0)
    assert [[lengths[row] for row in micro] for micro in step] == [[93, 1], [92, 2], [91, 3], [90, 4]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [None, 1, 300, 10_000])
def test_balanced_steps_hold_the_rows_of_plain_ones_with_as_many_micro_batches_on_every_rank(world, max_tokens):
    lengths = np.random.default_rng(0).integers(1, 200, 50)
    ways = [{}, {"lengths": lengths, "max_tokens": max_tokens}]
    plain, balanced = (
        [list(StepSampler(50, 16, 3, seed=7, rank=rank, world_size=world, **way).epoch(1)) for rank in range(world)]
        for way in ways
    )
    for step in range(4):
        parts = [ranks[step] for ranks in balanced]
        assert sorted(flat(parts)) == sorted(flat([ranks[step] for ranks in plain]))
        assert len({len(part) for part in parts}) == 1
        if max_tokens is None:
            assert all(len(micro) <= 3 for part in parts for micro in part)


@pytest.mark.parametrize("max_tokens", [400, 1000, 5000])
def test_a_budget_of_tokens_is_kept_with_about_as_few_micro_batches_as_it_takes(max_tokens):
    lengths = np.random.default_rng(2).integers(1, 400, 64).tolist()
    (step,) = StepSampler(64, 64, 1, seed=0, lengths=lengths, max_tokens=max_tokens).epoch(0)
    sums = [sum(lengths[row] for row in micro) for micro in step]
    assert max(sums) <= max_tokens and len(sums) <= 1.1 * sum(lengths) / max_tokens + 1


def test_a_row_beyond_the_budget_is_a_micro_batch_of_its_own():
    lengths = [500, 3, 500, 2, 1]
    (step,) = StepSampler(5, 8, 1, seed=0, lengths=lengths, max_tokens=10).epoch(0)
    assert sorted(sorted(micro) for micro in step if micro) == [[0], [1, 3, 4], [2]]


def test_ranks_work_on_micro_batches_of_like_size_at_the_same_time():
    lengths = np.random.default_rng(1).integers(1, 400, 64)
    first, second = (
        next(StepSampler(64, 64, 4, seed=0, rank=rank, world_size=2, lengths=lengths).epoch(0)) for rank in (0, 1)
    )
    sums = [[sum(lengths[row] for row in micro) for micro in part] for part in (first, second)]
    assert all(abs(here - there) < 0.1 * here for here, there in zip(*sums, strict=True))


def test_a_budget_of_tokens_needs_lengths():
    with pytest.raises(ValueError, match="lengths"):
        StepSampler(4, 4, 2, seed=0, max_tokens=100)


def test_no_rows_is_a_data_error():
    with pytest.raises(DataError, match="no rows"):
        StepSampler(0, 4, 2, seed=0)
