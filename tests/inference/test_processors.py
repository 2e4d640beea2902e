"""What the post-processors make of rated answers, against plain formulas."""

from __future__ import annotations

import random

import pytest

from openrlhf.errors import DataError
from openrlhf.inference.processors import processed


def rated(seed: int, prompts: int = 7, answers: int = 40) -> list[dict]:
    """Return rated answers to prompts in mixed order, with equal rewards among them."""
    draw = random.Random(seed)
    return [
        {"input": f"p{draw.randrange(prompts)}", "output": f"a{n}", "reward": draw.randrange(-4, 5) / 4}
        for n in range(answers)
    ]


def first_with(rows: list[dict], prompt: str, reward: float) -> dict:
    return next(row for row in rows if row["input"] == prompt and row["reward"] == reward)


def groups(rows: list[dict]) -> dict[str, list[float]]:
    """Return the rewards by prompt, prompts in the order in which they come first."""
    return {prompt: [row["reward"] for row in rows if row["input"] == prompt] for prompt in order(rows)}


def order(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["input"] for row in rows))


@pytest.mark.parametrize("seed", range(5))
def test_rejection_sampling_keeps_the_first_best_answer_to_each_prompt(seed):
    rows = rated(seed)
    expected = [first_with(rows, prompt, max(rewards)) for prompt, rewards in groups(rows).items()]
    found = processed("rs", rows)
    assert found == expected
    assert [list(row) for row in found] == [["input", "output", "reward"]] * len(expected)


@pytest.mark.parametrize("seed", range(5))
def test_iterative_dpo_pairs_the_first_best_with_the_first_worst_answer(seed):
    rows = rated(seed)
    found = processed("iter_dpo", rows)
    assert [row["prompt"] for row in found] == order(rows)
    for row, rewards in zip(found, groups(rows).values(), strict=True):
        best, worst = (first_with(rows, row["prompt"], pick(rewards)) for pick in (max, min))
        assert list(row.values()) == [
            row["prompt"], best["output"], best["reward"], worst["output"], worst["reward"],
        ]  # fmt: skip
        assert list(row) == ["prompt", "chosen", "chosen_reward", "rejected", "rejected_reward"]


def test_a_single_answer_is_both_sides_of_its_pair():
    assert processed("iter_dpo", [{"input": "p", "output": "a", "reward": 0.5}]) == [
        {"prompt": "p", "chosen": "a", "chosen_reward": 0.5, "rejected": "a", "rejected_reward": 0.5}
    ]


def test_conditional_sft_tells_the_reward_in_two_decimals_and_keeps_the_answer():
    rows = [{"input": "Why {reward}?", "output": "b", "reward": 1.005}, {"input": "p", "output": "c", "reward": -2.0}]
    assert processed("csft", rows) == [
        {"input": "Why {reward}? <rm_score>: 1.00 ", "output": "b", "reward": 1.005},
        {"input": "p <rm_score>: -2.00 ", "output": "c", "reward": -2.0},
    ]
    found = processed("csft", rows, template="{reward}|{input}")
    assert [row["input"] for row in found] == ["1.00|Why {reward}?", "-2.00|p"]
    assert [list(row) for row in found] == [["input", "output", "reward"]] * 2


def test_normalised_rewards_are_standard_deviations_of_a_sample_from_the_mean():
    rows = [{"input": "p", "output": "a", "reward": reward} for reward in (1.0, 2.0, 6.0)]
    found = processed("csft", rows, normalize=True)
    # mean 3, deviations -2, -1, 3: variance 14 / 2 = 7
    expected = [deviation / 7**0.5 for deviation in (-2, -1, 3)]
    assert [row["reward"] for row in found] == pytest.approx(expected, abs=1e-12)
    assert [row["input"] for row in found] == [f"p <rm_score>: {value:.2f} " for value in expected]


@pytest.mark.parametrize("rewards", [[1.0], [0.5, 0.5, 0.5]])
def test_rewards_without_a_spread_cannot_be_normalised(rewards):
    rows = [{"input": "p", "output": "a", "reward": reward} for reward in rewards]
    with pytest.raises(DataError, match="--normalize_reward"):
        processed("csft", rows, normalize=True)


def test_no_post_processor_leaves_the_rows_alone():
    rows = rated(0)
    assert processed(None, rows) == rows
