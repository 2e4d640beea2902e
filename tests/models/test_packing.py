import pytest
import torch

from openrlhf.errors import DataError
from openrlhf.models.packing import position_ids_of, predicted_places, remove_padding, restore

SEQUENCES = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def test_removing_padding_gives_one_row_with_restarting_positions():
    batch = remove_padding(SEQUENCES, MASK)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch.rows.lengths == (3, 1, 4)
    assert batch.rows.starts.tolist() == [0, 3, 4, 8]
    assert batch.rows.longest == 4


def test_filler_is_a_sequence_of_its_own_after_the_real_tokens():
    batch = remove_padding(SEQUENCES, MASK, multiple=5)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0, 1]]
    assert batch.rows.lengths == (3, 1, 4, 2)
    assert batch.rows.starts.tolist() == [0, 3, 4, 8, 10]
    assert torch.equal(restore(batch.input_ids[0, : len(batch.indices)], batch.indices, (3, 4)), SEQUENCES)
    assert remove_padding(SEQUENCES, MASK, multiple=4).rows.lengths == (3, 1, 4)


def test_a_row_without_tokens_vanishes_from_the_lengths():
    mask = MASK.clone()
    mask[1] = False
    batch = remove_padding(SEQUENCES, mask)
    assert batch.rows.lengths == (3, 4)
    assert batch.rows.starts.tolist() == [0, 3, 7]


def test_a_batch_without_tokens_is_refused():
    with pytest.raises(DataError, match="attention mask"):
        remove_padding(SEQUENCES, torch.zeros_like(MASK))


BRANCHES = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7], [5, 6, 7, 8], [5, 6, 4, 0], [5, 6, 7, 3]])


def test_what_sequences_begin_with_is_in_the_row_once():
    batch = remove_padding(BRANCHES, BRANCHES != 0, multiple=4, least_shared=2)
    assert batch.input_ids.tolist() == [[8, 9, 5, 6, 7, 8, 5, 6, 4, 7, 3, 0]]
    assert batch.rows.lengths == (1, 4, 1, 3, 2, 1)
    whole = batch.whole(batch.input_ids[0])
    assert torch.equal(whole[: len(batch.indices)], BRANCHES[BRANCHES != 0])
    assert batch.whole(batch.position_ids[0])[:19].tolist() == [
        0,
        1,
        2,
        3,
        0,
        1,
        2,
        3,
        0,
        1,
        2,
        3,
        0,
        1,
        2,
        0,
        1,
        2,
        3,
    ]
    assert batch.rows.keys.lengths == (4, 4, 4, 3, 4, 1)
    assert batch.rows.keys.starts.tolist() == [0, 4, 8, 12, 15, 19, 20]
    assert batch.rows.longest == 4


def test_equal_sequences_keep_a_token_of_their_own():
    batch = remove_padding(BRANCHES[:1].repeat(3, 1), torch.ones(3, 4), multiple=4, least_shared=1)
    assert batch.rows.lengths == (4, 1, 1, 2)
    assert batch.whole(batch.input_ids[0]).tolist() == [5, 6, 7, 8] * 3 + [0, 0]


@pytest.mark.parametrize(("rows", "least_shared"), [(BRANCHES, 4), (BRANCHES, None), (BRANCHES[:2], 1)])
def test_too_little_in_common_is_computed_again(rows, least_shared):
    batch = remove_padding(rows, rows != 0, least_shared=least_shared)
    assert batch.rows.keys is None
    assert batch.input_ids.tolist() == [rows[rows != 0].tolist()]


def test_a_beginning_that_is_a_small_part_of_the_batch_is_computed_again():
    rows = torch.arange(1, 201).view(2, 100)
    rows[1, :12] = rows[0, :12]
    assert remove_padding(rows, rows != 0, least_shared=12).rows.keys is None
    rows[1, :13] = rows[0, :13]
    assert remove_padding(rows, rows != 0, least_shared=12).rows.lengths == (100, 87)


def test_restoring_undoes_removing():
    batch = remove_padding(SEQUENCES, MASK)
    assert torch.equal(restore(batch.input_ids[0], batch.indices, (3, 4)), SEQUENCES)


def test_restoring_passes_gradients_to_the_right_places():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    restored = restore(values, torch.tensor([1, 4]), (2, 3))
    (restored * torch.arange(6.0).view(2, 3)).sum().backward()
    assert values.grad.tolist() == [1.0, 4.0]


def test_positions_start_at_the_first_real_token_on_either_padding_side():
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert position_ids_of(left).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert position_ids_of(left.flip(1)).tolist() == [[0, 1, 1, 1], [0, 1, 2, 3]]


def test_a_place_is_predicted_where_a_token_and_its_successor_are_real():
    assert predicted_places(MASK).tolist() == [[True, True, False], [False, False, False], [True, True, True]]
