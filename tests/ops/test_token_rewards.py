"""Where the score and the KL penalty go."""

import math

import pytest
import torch

from openrlhf.ops.token_rewards import last_action, token_rewards

MASK = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def test_the_last_action_is_found_in_every_row_that_has_one():
    assert last_action(MASK).int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0] * 5, [0, 0, 0, 0, 1]]


def test_rewards_equal_a_loop_over_actions():
    scores, kl = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    rewards = token_rewards(scores, kl, MASK, kl_coef=0.1)
    for row in range(4):
        actions = [t for t in range(5) if MASK[row, t]]
        for t in range(5):
            expected = (-0.1 * kl[row, t].item() if t in actions else 0.0) + (
                scores[row].item() if actions and t == actions[-1] else 0.0
            )
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kl_coef", [0.0, -1.0])
def test_without_a_positive_coefficient_there_is_no_penalty(kl_coef):
    rewards = token_rewards(torch.ones(4), torch.full((4, 5), math.nan), MASK, kl_coef=kl_coef)
    assert rewards.sum(dim=1).tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_divergence_off_the_actions_is_ignored(poison):
    kl = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    clean = token_rewards(torch.ones(4), kl, MASK, kl_coef=0.1)
    assert torch.equal(token_rewards(torch.ones(4), kl.masked_fill(~MASK, poison), MASK, kl_coef=0.1), clean)


def test_padding_adds_only_zeros():
    kl = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    narrow = token_rewards(torch.ones(4), kl, MASK, kl_coef=0.1)
    pad = torch.nn.functional.pad
    wide = token_rewards(torch.ones(4), pad(kl, (0, 3), value=9.0), pad(MASK, (0, 3)), kl_coef=0.1)
    assert torch.equal(wide, pad(narrow, (0, 3)))


def test_scores_in_bf16_give_rewards_in_fp32():
    scores = torch.ones(4, dtype=torch.bfloat16)
    assert token_rewards(scores, torch.zeros(4, 5), MASK, kl_coef=0.1).dtype == torch.float32
