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


def test_lengths_put_rows_of_like_length_into_one_micro_batch():
    lengths = [1, 90, 2, 91, 3, 92, 4, 93]
    (step,) = StepSampler(8, 8, 2, seed=5, lengths=lengths).epoch(0)
    assert [[lengths[row] for row in micro] for micro in step] == [[93, 92], [91, 90], [4, 3], [2, 1]]


def test_no_rows_is_a_data_error():
    with pytest.raises(DataError, match="no rows"):
        StepSampler(0, 4, 2, seed=0)
