"""The ranks of one program: each works on its part, all hear everything, and they stop and fail together."""

from __future__ import annotations

import pytest

from openrlhf.errors import NumericError
from openrlhf.strategy.comm import SoloComm
from openrlhf.trainer.ppo.groups import LocalGroup
from openrlhf.trainer.ppo.together import score_together, share_of_prompts
from tests.strategy.ranks import run_ranks
from tests.trainer.ppo.rank_programs import ROLLOUTS, Adder, judge


@pytest.fixture(scope="module")
def heard() -> list[dict]:
    """What each of two ranks heard."""
    return run_ranks("tests.trainer.ppo.rank_programs:everything", 2)


def test_each_rank_works_on_its_slice_and_all_hear_all_values(heard):
    for rank, found in enumerate(heard):
        groups = found["groups"]
        assert groups["size"] == 2
        assert groups["here"] == [[22, 44], [166, 188]][rank]
        assert groups["all"] == [22, 44, 166, 188]
        assert groups["totals"] == [(0, 66), (1, 354)]


def test_a_method_that_fails_on_one_rank_leaves_the_others_free_to_agree_on_it(heard):
    assert [found["groups"]["failed"] for found in heard] == [[None, "no space left"]] * 2


def test_each_rank_asks_for_the_rewards_of_whole_prompts_and_hears_all_in_order(heard):
    expected = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], {"seen": [2.0, 2.0, 4.0, 4.0, 4.0, 4.0]}
    assert [found["rewards"] for found in heard] == [expected] * 2


def test_a_reward_that_fails_on_one_rank_is_the_same_error_on_all(heard):
    assert [found["a_wrong_reward"] for found in heard] == ["no reward for c"] * 2


@pytest.mark.parametrize("where", ["a_stop_in_a_call", "a_stop_in_a_reward"])
def test_one_rank_that_is_asked_to_stop_takes_the_others_along(heard, where):
    assert [found[where] for found in heard] == ["stopped by a signal to another rank", "stopped by SIGTERM"]


@pytest.mark.parametrize(
    ("uids", "parts", "expected"),
    [
        ("aabbcc", 2, [(0, 2), (2, 6)]),
        ("aab", 3, [(0, 0), (0, 2), (2, 3)]),
        ("", 2, [(0, 0), (0, 0)]),
        ("aaaa", 1, [(0, 4)]),
    ],
)
def test_samples_of_a_prompt_are_never_parted(uids, parts, expected):
    assert share_of_prompts(list(uids), parts) == expected


def test_an_error_that_is_ours_passes_through_where_there_is_one_process():
    def broken(rollouts):
        raise NumericError("nan", [0])

    with pytest.raises(NumericError, match="nan"):
        score_together(SoloComm(), ROLLOUTS, broken)


def test_one_process_asks_about_everything_at_once():
    assert score_together(SoloComm(), ROLLOUTS, judge) == judge(ROLLOUTS)


def test_items_that_cannot_be_dealt_evenly_are_a_mistake_of_the_caller():
    class Pair(SoloComm):
        world_size = 2

    with pytest.raises(ValueError, match="3 items for 2 workers"):
        LocalGroup(Adder(0), Pair()).map(Adder.add, [1, 2, 3], [1, 2, 3])
