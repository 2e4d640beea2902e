"""Losses over pairs, and over answers that stand alone."""

import math
from functools import partial

import pytest
import torch

from openrlhf.ops.preference_loss import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_exp_loss,
    orpo_loss,
    paired_kto_loss,
    pairwise_loss,
    simpo_loss,
)

CHOSEN, REJECTED = torch.tensor([1.0]), torch.tensor([0.2])
# Log-probs of policy (-10, -14) and reference (-11, -13).
RATIOS = torch.tensor([-10.0 + 11.0]), torch.tensor([-14.0 + 13.0])
PAIR_LOSSES = {
    "pairwise": pairwise_loss,
    "log-exp": log_exp_loss,
    "dpo": partial(dpo_loss, beta=0.3),
    "cdpo": partial(dpo_loss, beta=0.3, label_smoothing=0.2),
    "ipo": partial(ipo_loss, beta=0.3),
    "simpo": partial(simpo_loss, beta=2.0, target_margin=0.5),
    "orpo": partial(orpo_loss, beta=0.3),
    "kto_pair": partial(paired_kto_loss, beta=0.3, chosen_kl=torch.tensor(0.2), rejected_kl=torch.tensor(0.1)),
}


def log_probs(seed, count=6):
    """Return negative numbers, as log-probs are; double, so that the formulas can be written down naively."""
    return -torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.05


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


@pytest.mark.parametrize(("margin", "expected"), [(None, 0.371101), (0.0, 0.371101), (0.5, 0.554355)])
def test_the_pairwise_loss_equals_the_worked_numbers(margin, expected):
    margin = None if margin is None else torch.tensor([margin])
    assert pairwise_loss(CHOSEN, REJECTED, margin).item() == pytest.approx(expected, abs=1e-6)


def test_the_log_exp_loss_equals_its_formula_and_the_pairwise_loss():
    assert log_exp_loss(CHOSEN, REJECTED).item() == pytest.approx(math.log(1 + math.exp(0.2 - 1.0)), abs=1e-6)
    torch.testing.assert_close(log_exp_loss(CHOSEN, REJECTED), pairwise_loss(CHOSEN, REJECTED))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (partial(dpo_loss, beta=0.1), 0.598139),
        (partial(dpo_loss, beta=0.1, label_smoothing=0.1), 0.618139),
        (partial(ipo_loss, beta=0.1), 9.0),
    ],
)
def test_dpo_cdpo_and_ipo_equal_the_worked_numbers(loss, expected):
    assert loss(*RATIOS).item() == pytest.approx(expected, abs=1e-6)


def test_simpo_equals_its_formula():
    chosen, rejected = log_probs(0), log_probs(1)
    expected = sum(-math.log(sigmoid(2.5 * (c - r) - 0.7)) for c, r in zip(chosen.tolist(), rejected.tolist()))
    assert simpo_loss(chosen, rejected, beta=2.5, target_margin=0.7).item() == pytest.approx(expected, abs=1e-6)


def test_orpo_equals_its_formula():
    chosen, rejected = log_probs(0), log_probs(1)
    expected = 0.0
    for c, r in zip(chosen.tolist(), rejected.tolist()):
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (c, r)]
        expected += -c - 0.4 * math.log(sigmoid(math.log(odds[0] / odds[1])))
    assert orpo_loss(chosen, rejected, beta=0.4).item() == pytest.approx(expected, abs=1e-6)


def test_orpo_is_finite_for_an_answer_that_is_certain():
    chosen = torch.zeros(1, requires_grad=True)
    loss = orpo_loss(chosen, torch.tensor([-3.0]), beta=0.1)
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite()


@pytest.mark.parametrize(("ratio", "desirable"), [(2.0, True), (-1.0, False)])
def test_kto_equals_the_worked_numbers(ratio, desirable):
    loss = kto_loss(torch.tensor([ratio]), torch.tensor([desirable]), torch.tensor(0.5), beta=0.01)
    assert loss.item() == pytest.approx(0.49625, abs=1e-6)


def test_kto_weighs_desirable_and_other_answers_apart():
    ratios, desirable, kl = log_probs(2), torch.tensor([True, False, True, True, False, False]), torch.tensor(0.3)
    expected = 0.0
    for ratio, good in zip(ratios.tolist(), desirable.tolist()):
        gap = 0.2 * (ratio - 0.3)
        expected += 1.5 * (1 - sigmoid(gap)) if good else 0.5 * (1 - sigmoid(-gap))
    loss = kto_loss(ratios, desirable, kl, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_takes_answers_of_one_kind_only(desirable):
    ratios = torch.tensor([0.4, -0.2], requires_grad=True)
    kto_loss(ratios, torch.full((2,), desirable), torch.tensor(0.0), beta=1.0).backward()
    assert (ratios.grad < 0).all() if desirable else (ratios.grad > 0).all()


def test_no_gradient_flows_into_the_divergence_of_kto():
    kl = torch.tensor(0.5, requires_grad=True)
    ratios = torch.tensor([0.1], requires_grad=True)
    kto_loss(ratios, torch.tensor([True]), kl, beta=1.0).backward()
    assert kl.grad is None and ratios.grad is not None


@pytest.mark.parametrize(("chosen", "rejected"), [([1.0, 0.6], [-0.5, 0.9]), ([-1.0, -0.4], [-0.5, -0.9])])
def test_paired_kto_measures_each_side_against_the_other(chosen, rejected):
    kl_chosen, kl_rejected = max(0.0, sum(chosen) / 2), max(0.0, sum(rejected) / 2)
    expected = sum(1 - sigmoid(0.3 * (c - kl_rejected)) for c in chosen)
    expected += sum(1 - sigmoid(0.3 * (kl_chosen - r)) for r in rejected)
    divergences = {"chosen_kl": torch.tensor(kl_chosen), "rejected_kl": torch.tensor(kl_rejected)}
    loss = paired_kto_loss(torch.tensor(chosen), torch.tensor(rejected), beta=0.3, **divergences)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
def test_losses_are_sums_over_pairs(loss):
    chosen, rejected = log_probs(0), log_probs(1)
    singles = sum(loss(chosen[i : i + 1], rejected[i : i + 1]) for i in range(6))
    torch.testing.assert_close(loss(chosen, rejected), singles)


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
def test_a_loss_pushes_the_chosen_answer_up_and_the_other_down(loss):
    chosen, rejected = (log_probs(seed).requires_grad_() for seed in (0, 1))
    loss(chosen, rejected).backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


@pytest.mark.parametrize("loss", [pairwise_loss, log_exp_loss])
def test_a_huge_difference_overflows_neither_loss_nor_gradient(loss):
    chosen = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    total = loss(chosen, torch.zeros(2))
    total.backward()
    assert total.item() == 5000.0
    assert chosen.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
def test_no_pairs_cost_nothing(loss):
    assert loss(torch.zeros(0), torch.zeros(0)) == 0


def test_a_margin_keeps_the_dtype_of_the_rewards():
    assert pairwise_loss(CHOSEN.bfloat16(), REJECTED.bfloat16(), torch.tensor([0.5])).dtype == torch.bfloat16
