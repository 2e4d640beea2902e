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
