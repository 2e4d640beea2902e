"""Ranks that share each batch: what one rank has of it, and that together they give what one alone gives."""

import pytest
import torch

from openrlhf.errors import UsageError
from openrlhf.models.actor import Actor
from openrlhf.models.packing import remove_padding
from openrlhf.models.ring import Ring
from tests.helpers import tiny_causal_lm
from tests.models.ring_programs import sequences
from tests.strategy.ranks import run_ranks


def test_every_token_is_in_one_chunk_and_positions_go_on_over_the_chunks():
    batch = remove_padding(*sequences((7, 3)))
    shares = [Ring(None, rank, 4).share(batch) for rank in range(4)]
    assert [share.input_ids.shape for share in shares] == [(1, 3)] * 4
    assert torch.equal(torch.cat([share.input_ids for share in shares], 1)[:, :10], batch.input_ids)
    assert torch.cat([share.position_ids for share in shares], 1).tolist() == [[*range(7), *range(3), 0, 0]]


def test_a_rank_sees_its_sequences_from_their_beginning_to_its_last_token():
    batch = remove_padding(*sequences((7, 3)))
    parts = [Ring(None, rank, 4).share(batch).rows.parts for rank in range(4)]
    assert parts == [
        ((3, slice(0, 3)),),
        ((3, slice(0, 6)),),
        ((1, slice(0, 7)), (2, slice(7, 9))),
        ((1, slice(7, 10)), (2, slice(10, 12))),
    ]


def test_what_is_wanted_of_a_row_is_found_in_the_chunks():
    wanted = torch.tensor([0, 1, 2, 3, 9])
    found = [Ring(None, rank, 4).mine(wanted, 3) for rank in range(4)]
    assert [mine.places.tolist() for mine in found] == [[0, 1, 2], [0], [], [0]]
    assert {mine.counts for mine in found} == {(3, 1, 0, 1)}
    assert [wanted[mine.span].tolist() for mine in found] == [[0, 1, 2], [3], [], [9]]


def test_one_rank_alone_changes_nothing():
    batch, wanted = remove_padding(*sequences()), torch.tensor([4, 7])
    mine = Ring().mine(wanted, 41)
    assert Ring().share(batch) is batch
    assert mine.places is wanted and Ring().join(wanted, mine.counts) is wanted


def test_a_stride_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(UsageError, match="--ring_head_stride 3 does not divide the 2 key-value heads of llama"):
        Actor(tiny_causal_lm(None, "llama", num_key_value_heads=2)).share_batches(Ring(None, 0, 2, head_stride=3))


def differences(ranks: int, ring: int) -> dict[str, float]:
    found = run_ranks("tests.models.ring_programs:compared", ranks, size=ring)
    assert all(ranks_agree.keys() == found[0].keys() for ranks_agree in found)
    return {name: max(result[name] for result in found) for name in found[0]}


def test_log_probs_values_and_gradients_are_those_of_one_rank():
    assert {name: off for name, off in differences(2, 2).items() if not off <= 1e-5} == {}


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "ring"), [(3, 3), (4, 4), (4, 2)])
def test_so_they_are_in_larger_rings_and_in_several(ranks, ring):
    found = differences(ranks, ring)
    print(f"rings of {ring} on {ranks} ranks: {len(found)} cases, the largest difference is {max(found.values()):.1e}")
    assert {name: off for name, off in found.items() if not off <= 1e-5} == {}
