"""What a model said is known to all ranks, and asked again by all of them when one has lost it."""

import pytest

from tests.strategy.ranks import run_ranks


@pytest.mark.parametrize("own_disks", [True, False])
def test_ranks_ask_their_share_and_find_all_answers_again(tmp_path, own_disks):
    """Seven rows, two at a time, are four forwards of one rank and two of each of two ranks."""
    found = run_ranks("tests.trainer.known_programs:starts", 2, folder=str(tmp_path), own_disks=own_disks)
    assert found == [[(2, True), (0, True), (2, True)]] * 2
