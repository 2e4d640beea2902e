"""The losses of policy and critic."""

import math

import pytest
import torch

from openrlhf.ops.policy_loss import ppo_policy_loss, value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def policy(ratio, advantage, **kwargs):
    log_probs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    loss, metrics = ppo_policy_loss(log_probs, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), ONE, **kwargs)
    loss.backward()
    return loss.item(), log_probs.grad.item(), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [(1.5, 1.0, -1.2, True), (1.5, -1.0, 1.5, False), (0.5, 1.0, -0.5, False), (0.5, -1.0, 0.8, True)],
)
def test_the_clipped_loss_equals_the_worked_numbers(ratio, advantage, expected, clipped):
    loss, gradient, metrics = policy(ratio, advantage, clip=0.2)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient == 0) == clipped
    assert [int(x) for x in metrics["clip_fraction"]] == [int(clipped), 1]


def a_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_probs, old, advantages = (torch.randn(3, 7, generator=generator) for _ in range(3))
    return log_probs, old, advantages, torch.rand(3, 7, generator=generator) < 0.6


def test_the_policy_loss_is_the_sum_of_a_loop_over_actions():
    log_probs, old, advantages, mask = a_batch()
    expected = 0.0
    for row, column in mask.nonzero().tolist():
        ratio = math.exp(log_probs[row, column] - old[row, column])
        advantage = advantages[row, column].item()
        expected -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert ppo_policy_loss(log_probs, old, advantages, mask)[0].item() == pytest.approx(expected, rel=1e-5)


def test_on_policy_the_gradient_is_minus_the_advantage():
    log_probs, _, advantages, mask = a_batch()
    log_probs.requires_grad_()
    loss, metrics = ppo_policy_loss(log_probs, log_probs.detach(), advantages, mask)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.where(mask, -advantages, 0.0))
    assert [float(x) for x in metrics["approx_kl"]] == [0.0, float(mask.sum())]
    assert int(metrics["clip_fraction"][0]) == 0


def test_the_divergence_metric_estimates_kl_of_old_and_new_policy():
    """Averaged over the old policy's distribution, the k3 metric is exactly KL(old || new)."""
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.log_softmax(torch.randn(6, generator=generator), 0) for _ in range(2))
    total = 0.0
    for token in range(6):
        _, metrics = ppo_policy_loss(new[token].view(1, 1), old[token].view(1, 1), torch.ones(1, 1), ONE)
        total += old[token].exp().item() * metrics["approx_kl"][0].item()
    assert total == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-4)


def poisoned(tensors, mask, poison):
    return [x.masked_fill(~mask, poison) for x in tensors]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_the_policy_loss_ignores_everything_off_the_mask(poison):
    *tensors, mask = a_batch()
    results = []
    for log_probs, old, advantages in (tensors, poisoned(tensors, mask, poison)):
        log_probs = log_probs.clone().requires_grad_()
        loss, metrics = ppo_policy_loss(log_probs, old, advantages, mask)
        loss.backward()
        results.append([loss.detach(), log_probs.grad, *metrics["clip_fraction"], *metrics["approx_kl"]])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_a_runaway_log_ratio_stays_finite():
    log_probs = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss, _ = ppo_policy_loss(log_probs, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()


def test_losses_of_two_micro_batches_add_up_to_the_loss_of_both():
    *tensors, mask = a_batch()
    whole, metrics = ppo_policy_loss(*tensors, mask)
    parts = [ppo_policy_loss(*(x[rows] for x in tensors), mask[rows]) for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(part[0] for part in parts), whole)
    for name in metrics:
        torch.testing.assert_close(sum(part[1][name][0] for part in parts), metrics[name][0])
    whole_value, _ = value_loss(*tensors, mask, clip=0.2)
    parts = [value_loss(*(x[rows] for x in tensors), mask[rows], clip=0.2)[0] for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), whole_value)


def test_an_empty_mask_gives_zero_with_a_zero_gradient():
    *tensors, mask = a_batch()
    log_probs = tensors[0].requires_grad_()
    for loss, _ in (
        ppo_policy_loss(log_probs, *tensors[1:], torch.zeros_like(mask)),
        value_loss(log_probs, *tensors[1:], torch.zeros_like(mask), clip=0.2),
    ):
        loss.backward()
        assert loss == 0
    assert torch.equal(log_probs.grad, torch.zeros(3, 7))


def test_the_value_loss_equals_the_worked_number():
    values, old, returns = (torch.tensor([[x]]) for x in (1.0, 0.5, 1.2))
    loss, metrics = value_loss(values, old, returns, ONE, clip=0.2)
    assert loss.item() == pytest.approx(0.125)
    assert [int(x) for x in metrics["value_clip_fraction"]] == [1, 1]
    assert value_loss(values, old, returns, ONE)[0].item() == pytest.approx(0.5 * 0.2**2)


def test_the_value_loss_is_the_sum_of_a_loop_over_actions():
    values, old, returns, mask = a_batch()
    expected = 0.0
    for row, column in mask.nonzero().tolist():
        v, o, r = (x[row, column].item() for x in (values, old, returns))
        expected += 0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2)
    assert value_loss(values, old, returns, mask, clip=0.2)[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_value_loss_ignores_everything_off_the_mask(poison):
    *tensors, mask = a_batch()
    gradients = []
    for values, old, returns in (tensors, poisoned(tensors, mask, poison)):
        values = values.clone().requires_grad_()
        value_loss(values, old, returns, mask, clip=0.2)[0].backward()
        gradients.append(values.grad)
    assert torch.equal(*gradients)
