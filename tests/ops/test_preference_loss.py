"""Losses over pairs."""

import math

import pytest
import torch

from openrlhf.ops.preference_loss import log_exp_loss, pairwise_loss

CHOSEN, REJECTED = torch.tensor([1.0]), torch.tensor([0.2])


@pytest.mark.parametrize(("margin", "expected"), [(None, 0.371101), (0.0, 0.371101), (0.5, 0.554355)])
def test_the_pairwise_loss_equals_the_worked_numbers(margin, expected):
    margin = None if margin is None else torch.tensor([margin])
    assert pairwise_loss(CHOSEN, REJECTED, margin).item() == pytest.approx(expected, abs=1e-6)


def test_the_log_exp_loss_equals_its_formula_and_the_pairwise_loss():
    assert log_exp_loss(CHOSEN, REJECTED).item() == pytest.approx(math.log(1 + math.exp(0.2 - 1.0)), abs=1e-6)
    torch.testing.assert_close(log_exp_loss(CHOSEN, REJECTED), pairwise_loss(CHOSEN, REJECTED))


@pytest.mark.parametrize("loss", [pairwise_loss, log_exp_loss])
def test_losses_are_sums_over_pairs(loss):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    singles = sum(loss(chosen[i : i + 1], rejected[i : i + 1]) for i in range(6))
    torch.testing.assert_close(loss(chosen, rejected), singles)


@pytest.mark.parametrize("loss", [pairwise_loss, log_exp_loss])
def test_a_huge_difference_overflows_neither_loss_nor_gradient(loss):
    chosen = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    total = loss(chosen, torch.zeros(2))
    total.backward()
    assert total.item() == 5000.0
    assert chosen.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("loss", [pairwise_loss, log_exp_loss])
def test_no_pairs_cost_nothing(loss):
    assert loss(torch.zeros(0), torch.zeros(0)) == 0


def test_a_margin_keeps_the_dtype_of_the_rewards():
    assert pairwise_loss(CHOSEN.bfloat16(), REJECTED.bfloat16(), torch.tensor([0.5])).dtype == torch.bfloat16
