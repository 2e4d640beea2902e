"""Ranks agree on numbers and objects, and no rank waits for ever."""

import pytest
import torch

from openrlhf.errors import UsageError
from openrlhf.strategy.comm import SoloComm
from tests.strategy.ranks import run_ranks


def test_alone_every_operation_is_the_identity_and_a_copy():
    comm = SoloComm()
    tensor = torch.ones(2)
    result = comm.all_reduce(tensor)
    result += 1
    assert tensor.tolist() == [1, 1]
    assert comm.all_reduce(2, "mean") == 2.0
    assert comm.all_gather_object("x") == ["x"] and comm.broadcast_object("y") == "y"
    with pytest.raises(UsageError, match="sum, max, mean"):
        comm.all_reduce(1.0, "product")


def test_two_ranks_agree_on_every_operation():
    for found in run_ranks("tests.strategy.programs:comm_operations", 2):
        sums, objects = found[:6], found[7:]
        assert sums == [[2.0, 1.0], [1.0, 1.0], [1.0, 0.5], 2.0, 1.5, 1.0]
        assert objects == [[{"rank": 0}, {"rank": 1}], "from 1"]


@pytest.mark.full
def test_a_barrier_gives_up_at_its_deadline_and_names_itself_and_the_missing_rank():
    message = run_ranks("tests.strategy.programs:absent_from_barrier", 2)[0]
    assert "rank 0 waited 2 s at the barrier 'the test' for ranks [1] of 2" in message


def said_about(how: str, victim: int, stage: int) -> str:
    """Return what the other rank says when ``victim`` stays away from a step; it must say so in time."""
    message, seconds = run_ranks(
        "tests.strategy.programs:absent_from_a_step", 2, check=False, how=how, victim=victim, stage=stage
    )[1 - victim]
    assert seconds < 4 + 5
    assert "--collective_timeout" in message
    return message


def test_a_stopped_rank_is_named_by_the_one_that_waits_inside_deepspeed():
    message = said_about("stopped", victim=1, stage=2)
    assert "rank 0 of 2 gave up in backward" in message
    assert "rank 1: no sign of life" in message


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_stopped_rank_is_named_at_every_stage(stage):
    assert "rank 1: no sign of life" in said_about("stopped", victim=1, stage=stage)


@pytest.mark.full
def test_the_rank_that_holds_the_store_is_named_too():
    assert "rank 0, where the ranks meet, does not answer" in said_about("stopped", victim=0, stage=2)


@pytest.mark.full
def test_a_killed_rank_is_named_at_once():
    assert "rank 1: no sign of life" in said_about("killed", victim=1, stage=2)


@pytest.mark.full
def test_a_rank_that_lives_but_does_not_come_is_told_with_its_place():
    assert "rank 1 lives but has not come here from 'all_gather_object'" in said_about("busy", victim=1, stage=2)
