"""Advantages through time and through groups."""

import math
import statistics

import pytest
import torch

from openrlhf.config.algorithms import ESTIMATORS
from openrlhf.ops import advantages as ops

VALUES, REWARDS = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[-0.01, -0.02, 1.0]])
EVERY = torch.ones(1, 3, dtype=torch.bool)
SCORES = torch.tensor([1.0, 0.0, 0.0, 2.0])


@pytest.mark.parametrize(
    ("lambd", "advantages", "returns"),
    [(1.0, [0.47, 0.58, 0.70], [0.97, 0.98, 1.0]), (0.95, [0.40775, 0.545, 0.70], [0.90775, 0.945, 1.0])],
)
def test_gae_equals_the_worked_numbers(lambd, advantages, returns):
    got = ops.gae(VALUES, REWARDS, EVERY, 1.0, lambd)
    torch.testing.assert_close(got[0], torch.tensor([advantages]))
    torch.testing.assert_close(got[1], torch.tensor([returns]))


def test_cumulative_returns_equal_the_worked_numbers():
    torch.testing.assert_close(ops.discounted_returns(REWARDS, EVERY, 1.0), torch.tensor([[0.97, 0.98, 1.0]]))


def a_batch(rows=5, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values, rewards = (torch.randn(rows, width, generator=generator) for _ in range(2))
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[1] = False
    return values, rewards, mask


def gae_by_definition(values, rewards, gamma, lambd):
    """The sum over future temporal-difference errors, written out."""
    n = len(values)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lambd) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lambd"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_over_spans_equals_the_definition_on_the_actions_alone(gamma, lambd):
    values, rewards, mask = a_batch()
    advantages, returns = ops.gae(values, rewards, mask, gamma, lambd)
    for row in range(len(values)):
        kept = mask[row]
        expected = torch.tensor(
            gae_by_definition(values[row][kept].tolist(), rewards[row][kept].tolist(), gamma, lambd)
        )
        torch.testing.assert_close(advantages[row][kept], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(returns[row][kept], expected + values[row][kept], rtol=1e-5, atol=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_discounted_returns_equal_the_definition_on_the_actions_alone():
    _, rewards, mask = a_batch()
    returns = ops.discounted_returns(rewards, mask, 0.9)
    for row in range(len(rewards)):
        kept = rewards[row][mask[row]].tolist()
        expected = [sum(0.9 ** (k - t) * kept[k] for k in range(t, len(kept))) for t in range(len(kept))]
        torch.testing.assert_close(returns[row][mask[row]], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert not returns[~mask].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_positions_off_the_mask_are_ignored(poison):
    values, rewards, mask = a_batch()
    clean = ops.gae(values, rewards, mask, 0.9, 0.8)
    dirty = ops.gae(values.masked_fill(~mask, poison), rewards.masked_fill(~mask, poison), mask, 0.9, 0.8)
    assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[1], clean[1])


def test_padding_and_the_order_of_rows_change_nothing():
    values, rewards, mask = a_batch()
    clean, _ = ops.gae(values, rewards, mask, 0.9, 0.8)
    pad = torch.nn.functional.pad
    wide, _ = ops.gae(pad(values, (0, 2), value=3.0), pad(rewards, (0, 2), value=3.0), pad(mask, (0, 2)), 0.9, 0.8)
    assert torch.equal(wide[:, :-2], clean)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(ops.gae(values[order], rewards[order], mask[order], 0.9, 0.8)[0], clean[order])


def test_advantages_and_returns_have_no_gradient_and_are_fp32():
    values = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    for tensor in ops.gae(values, REWARDS, EVERY, 1.0, 0.95):
        assert not tensor.requires_grad and tensor.dtype == torch.float32


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (ops.none, [1.0, 0.0, 0.0, 2.0]),
        (ops.rloo, [1 / 3, -1.0, -1.0, 5 / 3]),
        (ops.group_mean, [0.25, -0.75, -0.75, 1.25]),
        (ops.group_norm, [0.261116, -0.783349, -0.783349, 1.305582]),
    ],
)
def test_group_baselines_equal_the_worked_numbers(baseline, expected):
    torch.testing.assert_close(baseline(SCORES, 4), torch.tensor(expected), rtol=1e-5, atol=1e-6)


GROUP_BASELINES = {
    ops.rloo: lambda score, group: score - (sum(group) - score) / (len(group) - 1),
    ops.group_mean: lambda score, group: score - statistics.mean(group),
    ops.group_norm: lambda score, group: (score - statistics.mean(group)) / statistics.stdev(group),
}
"""Each with what it gives one score of a group, in plain numbers."""
RESCALING = [facts.load_baseline() for facts in ESTIMATORS.values() if facts.rescales]


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_group_baseline_equals_a_loop_over_groups(baseline, n):
    scores = torch.randn(5 * n, generator=torch.Generator().manual_seed(n))
    groups = [scores[start : start + n].tolist() for start in range(0, 5 * n, n)]
    expected = [GROUP_BASELINES[baseline](score, group) for group in groups for score in group]
    torch.testing.assert_close(baseline(scores, n), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_a_shift_of_the_scores_changes_no_group_baseline_and_a_scale_only_those_that_do_not_rescale(baseline):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    plain = baseline(scores, 4)
    torch.testing.assert_close(baseline(scores + 3, 4), plain, rtol=1e-5, atol=1e-5)
    factor = 1 if baseline in RESCALING else 5
    torch.testing.assert_close(baseline(5 * scores, 4), factor * plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.view(-1, 4).sum(dim=1), torch.zeros(3), rtol=0, atol=1e-5)


def test_a_greedy_answer_is_the_baseline_of_its_own_prompt():
    greedy = torch.tensor([0.5, -1.0])
    assert ops.remax(SCORES, 2, greedy).tolist() == [0.5, -0.5, 1.0, 3.0]
    assert ops.remax(SCORES, 1, SCORES).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="4 scores, 2 a prompt, do not go with 3 greedy ones"):
        ops.remax(SCORES, 2, torch.zeros(3))


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_groups_are_consecutive_and_do_not_see_each_other(baseline):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([baseline(scores[start : start + 3], 3) for start in range(0, 12, 3)])
    torch.testing.assert_close(baseline(scores, 3), alone)


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_the_order_within_a_group_does_not_matter(baseline):
    scores = torch.randn(5, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 4, 1, 3])
    torch.testing.assert_close(baseline(scores[order], 5), baseline(scores, 5)[order])


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e6])
def test_a_group_of_equal_scores_teaches_nothing(baseline, score):
    assert torch.equal(baseline(torch.full((14,), score), 7), torch.zeros(14))


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_groups_of_one_and_broken_groups_are_errors(baseline):
    with pytest.raises(ValueError, match="at least 2"):
        baseline(SCORES, 1)
    with pytest.raises(ValueError, match="do not divide"):
        baseline(SCORES, 3)
