"""Answers of reward sources as one."""

from __future__ import annotations

import pytest

from openrlhf.errors import DataError
from openrlhf.rollout.reward_result import RewardResult, result_from_json


def test_parts_are_joined_in_order_and_those_without_queries_count_for_nothing():
    parts = [
        RewardResult([1.0], {"b": [3.0], "a": [2.0]}),
        RewardResult([]),
        RewardResult([4.0], {"a": [5.0], "b": [6.0]}),
    ]
    joined = RewardResult.join(parts, "the function")
    assert joined == RewardResult([1.0, 4.0], {"a": [2.0, 5.0], "b": [3.0, 6.0]})
    assert RewardResult.join([], "the function") == RewardResult.join([RewardResult([])], "the function")


def test_scores_are_the_sources_own_whatever_it_logs_under_their_name():
    document = {"rewards": [1], "scores": [0], "extra_logs": {"scores": [5], "length": 3}}
    assert result_from_json(document, ["uid a"], "the server").extra == {"scores": [0.0], "length": [3.0]}


@pytest.mark.parametrize("turned", [False, True])
def test_a_number_that_some_queries_lack_is_an_error_that_names_it(turned):
    parts = [RewardResult([1.0], {"scores": [0.0]}), RewardResult([2.0])]
    with pytest.raises(DataError, match="the function gave 'scores' or .* for some queries only: scores; give"):
        RewardResult.join(parts[::-1] if turned else parts, "the function")
