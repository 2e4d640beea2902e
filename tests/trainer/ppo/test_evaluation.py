"""How well the reward agrees with the true score."""

import pytest

from openrlhf.trainer.ppo.evaluation import pair_accuracy


@pytest.mark.parametrize(
    ("scores", "true_scores", "expected"),
    [
        ([3.0, 1.0, 2.0], [1.0, 0.0, 0.0], 1.0),
        ([1.5, 1.0, 2.0], [1.0, 0.0, 0.0], 0.5),
        ([1.0, 1.0], [1.0, 0.0], 0.5),
        ([0.0, 1.0, 2.0], [1.0, 0.5, 0.0], 0.0),
    ],
)
def test_pair_accuracy_counts_the_pairs_in_the_right_order(scores, true_scores, expected):
    assert pair_accuracy(scores, true_scores) == expected


def test_pair_accuracy_says_nothing_when_all_answers_are_alike():
    assert pair_accuracy([1.0, 2.0], [1.0, 1.0]) is None
