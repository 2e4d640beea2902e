"""The losses of policy and critic, against numbers, loops over actions, and what must not change them."""

import math

import pytest
import torch

from openrlhf.ops.policy_loss import Clip, cispo, gspo, ppo, reduced, value_loss, weight

ONE = torch.ones(1, 1, dtype=torch.bool)
LOSSES = {"ppo": ppo, "gspo": gspo, "cispo": cispo}
USUAL = Clip()
CLIPS = [USUAL, Clip(0.1, 0.3), Clip(0.2, 0.2, 1.5), Clip(1.0, 4.0, 3.0)]
REDUCTIONS = ("token", "sequence")
every_loss = pytest.mark.parametrize("name", LOSSES)


def policy(ratio, advantage, clip=USUAL, loss=ppo):
    log_probs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    found = loss(log_probs, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), ONE, clip)
    found.loss.sum().backward()
    return found.loss.item(), log_probs.grad.item(), found.metrics(ONE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [(1.5, 1.0, -1.2, True), (1.5, -1.0, 1.5, False), (0.5, 1.0, -0.5, False), (0.5, -1.0, 0.8, True)],
)
@pytest.mark.parametrize("loss", [ppo, gspo])
def test_the_clipped_loss_equals_the_worked_numbers(loss, ratio, advantage, expected, clipped):
    loss, gradient, metrics = policy(ratio, advantage, loss=loss)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient == 0) == clipped
    assert [int(x) for x in metrics["clip_fraction"]] == [int(clipped), 1]


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "expected", "clipped"),
    [
        (1.25, 1.0, Clip(0.2, 0.3), -1.25, False),
        (1.5, 1.0, Clip(0.2, 0.3), -1.3, True),
        (0.5, -1.0, Clip(0.3, 0.2), 0.7, True),
        (5.0, -2.0, Clip(0.2, 0.2, 3.0), 6.0, True),
        (2.5, -2.0, Clip(0.2, 0.2, 3.0), 5.0, False),
        (5.0, 2.0, Clip(0.2, 0.2, 3.0), -2.4, True),
        (0.5, -2.0, Clip(0.2, 0.2, 3.0), 1.6, True),
    ],
)
def test_clip_higher_and_the_dual_clip_equal_numbers_by_hand(ratio, advantage, clip, expected, clipped):
    loss, gradient, metrics = policy(ratio, advantage, clip)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient == 0) == clipped
    assert int(metrics["clip_fraction"][0]) == int(clipped)


@pytest.mark.parametrize(("ratio", "weight", "advantage"), [(1.5, 1.2, 1.0), (0.5, 0.8, -2.0), (1.1, 1.1, 3.0)])
def test_cispo_bounds_the_weight_and_never_the_gradient(ratio, weight, advantage):
    loss, gradient, metrics = policy(ratio, advantage, loss=cispo)
    assert loss == pytest.approx(-weight * advantage * (math.log(ratio) - 1.0), rel=1e-5)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-5)
    assert int(metrics["clip_fraction"][0]) == int(ratio != weight)


def a_batch(seed=0, rows=3):
    generator = torch.Generator().manual_seed(seed)
    log_probs, old, advantages = (torch.randn(rows, 7, generator=generator) for _ in range(3))
    return log_probs, old, advantages, torch.rand(rows, 7, generator=generator) < 0.6


def by_hand(name, clip, log_prob, old, advantage, row_ratio):
    """The loss of one action, written with plain numbers."""
    ratio = row_ratio if name == "gspo" else math.exp(log_prob - old)
    bounded = min(max(ratio, 1 - clip.low), 1 + clip.high)
    if name == "cispo":
        return -bounded * advantage * log_prob
    objective = min(ratio * advantage, bounded * advantage)
    return -max(objective, clip.dual * advantage) if clip.dual and advantage < 0 else -objective


def loop_over_actions(name, clip, reduction, log_probs, old, advantages, mask):
    total, count = 0.0, 0
    for row in range(len(mask)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        gaps = [float(log_probs[row, t] - old[row, t]) for t in places]
        row_ratio = math.exp(sum(gaps) / len(gaps)) if gaps else 1.0
        losses = [
            by_hand(name, clip, *(float(x[row, t]) for x in (log_probs, old, advantages)), row_ratio) for t in places
        ]
        if places and reduction == "sequence":
            total, count = total + sum(losses) / len(losses), count + 1
        else:
            total, count = total + sum(losses), count + len(losses)
    return total, count


@every_loss
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_policy_loss_is_what_a_loop_over_actions_adds_up(name, clip, reduction):
    batch = a_batch(rows=5)
    batch[3][2] = False
    total, count = loop_over_actions(name, clip, reduction, *batch)
    loss = reduced(LOSSES[name](*batch, clip).loss, batch[3], reduction)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert int(weight(batch[3], reduction)) == count


@every_loss
def test_on_policy_every_loss_has_the_gradient_of_minus_the_advantage(name):
    log_probs, _, advantages, mask = a_batch()
    if name == "gspo":
        advantages = advantages[:, :1].expand_as(advantages)
    log_probs.requires_grad_()
    found = LOSSES[name](log_probs, log_probs.detach(), advantages, mask, Clip())
    reduced(found.loss, mask, "token").backward()
    torch.testing.assert_close(log_probs.grad, torch.where(mask, -advantages, 0.0))
    metrics = found.metrics(mask)
    assert [float(x) for x in metrics["approx_kl"]] == [0.0, float(mask.sum())]
    assert int(metrics["clip_fraction"][0]) == 0


def test_the_divergence_metric_estimates_kl_of_old_and_new_policy():
    """Averaged over the old policy's distribution, the k3 metric is exactly KL(old || new)."""
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.log_softmax(torch.randn(6, generator=generator), 0) for _ in range(2))
    total = 0.0
    for token in range(6):
        found = ppo(new[token].view(1, 1), old[token].view(1, 1), torch.ones(1, 1), ONE, Clip())
        total += old[token].exp().item() * found.metrics(ONE)["approx_kl"][0].item()
    assert total == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-4)


def poisoned(tensors, mask, poison):
    return [x.masked_fill(~mask, poison) for x in tensors]


def outcome(name, tensors, mask, reduction="token"):
    """The loss, the gradient and the metrics."""
    log_probs = tensors[0].clone().requires_grad_()
    found = LOSSES[name](log_probs, *tensors[1:], mask, Clip(0.2, 0.3, 2.0))
    loss = reduced(found.loss, mask, reduction)
    loss.backward()
    metrics = found.metrics(mask)
    return [loss.detach(), log_probs.grad, *metrics["clip_fraction"], *metrics["approx_kl"]]


@every_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_policy_loss_ignores_everything_off_the_mask(name, poison, reduction):
    *tensors, mask = a_batch()
    clean, dirty = (outcome(name, x, mask, reduction) for x in (tensors, poisoned(tensors, mask, poison)))
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_and_the_order_of_rows_change_no_policy_loss(name, reduction):
    *tensors, mask = a_batch(rows=5)
    loss, gradient, *metrics = outcome(name, tensors, mask, reduction)
    pad, order = torch.nn.functional.pad, torch.tensor([3, 1, 4, 0, 2])
    wide = outcome(name, [pad(x, (0, 3), value=7.0) for x in tensors], pad(mask, (0, 3)), reduction)
    torch.testing.assert_close(wide, [loss, pad(gradient, (0, 3)), *metrics])
    turned = outcome(name, [x[order] for x in tensors], mask[order], reduction)
    torch.testing.assert_close(turned, [loss, gradient[order], *metrics])


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_policy_loss_grows_as_its_advantages_and_sees_only_the_ratio(name, reduction):
    log_probs, old, advantages, mask = a_batch()
    loss, gradient, *metrics = outcome(name, [log_probs, old, advantages], mask, reduction)
    scaled = outcome(name, [log_probs, old, 3 * advantages], mask, reduction)
    torch.testing.assert_close(scaled, [3 * loss, 3 * gradient, *metrics])
    shifted = outcome(name, [log_probs - 2, old - 2, advantages], mask, reduction)
    torch.testing.assert_close(shifted[1], gradient)


@every_loss
def test_a_runaway_log_ratio_stays_finite(name):
    log_probs = torch.tensor([[500.0, -500.0], [500.0, 500.0]])
    tensors = [log_probs, torch.zeros(2, 2), torch.tensor([[-1.0, 1.0], [1.0, -1.0]])]
    assert all(x.isfinite().all() for x in outcome(name, tensors, torch.ones(2, 2, dtype=torch.bool)))


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_of_two_micro_batches_add_up_to_the_loss_of_both(name, reduction):
    *tensors, mask = a_batch()
    whole = outcome(name, tensors, mask, reduction)
    parts = [outcome(name, [x[rows] for x in tensors], mask[rows], reduction) for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])
    for total, *shares in zip(whole, *parts, strict=True):
        if total.dim() == 0:
            torch.testing.assert_close(sum(shares), total)
    values = [
        value_loss(*(x[rows] for x in tensors), mask[rows], clip=0.2, reduction=reduction)[0]
        for rows in (slice(None), slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(values[1] + values[2], values[0])


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_empty_mask_gives_zero_with_a_zero_gradient(name, reduction):
    *tensors, mask = a_batch()
    loss, gradient, *_ = outcome(name, tensors, torch.zeros_like(mask), reduction)
    assert loss == 0 and torch.equal(gradient, torch.zeros(3, 7))
    assert value_loss(*tensors, torch.zeros_like(mask), clip=0.2, reduction=reduction)[0] == 0


def test_the_value_loss_equals_the_worked_number():
    values, old, returns = (torch.tensor([[x]]) for x in (1.0, 0.5, 1.2))
    loss, metrics = value_loss(values, old, returns, ONE, clip=0.2)
    assert loss.item() == pytest.approx(0.125)
    assert [int(x) for x in metrics["value_clip_fraction"]] == [1, 1]
    assert value_loss(values, old, returns, ONE)[0].item() == pytest.approx(0.5 * 0.2**2)


def test_a_value_that_moved_less_than_the_clip_is_never_counted_as_clipped():
    generator = torch.Generator().manual_seed(0)
    old, moved, returns = torch.randn(3, 64, 64, generator=generator)
    old, moved = 0.15 * old.tanh(), 0.03 * moved.tanh()  # a smaller number than the step to it: the step is rounded
    mask = torch.ones(64, 64, dtype=torch.bool)
    loss, metrics = value_loss(moved, old, returns, mask, clip=0.2)
    assert [int(x) for x in metrics["value_clip_fraction"]] == [0, 64 * 64]
    assert loss == value_loss(moved, old, returns, mask)[0]


def test_the_value_loss_is_the_sum_of_a_loop_over_actions():
    values, old, returns, mask = a_batch()
    expected = 0.0
    for row, column in mask.nonzero().tolist():
        v, o, r = (x[row, column].item() for x in (values, old, returns))
        expected += 0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2)
    assert value_loss(values, old, returns, mask, clip=0.2)[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_value_loss_of_sequences_is_the_sum_of_their_means(reduction):
    values, old, returns, mask = a_batch()
    rows = [value_loss(*(x[row][mask[row]][None] for x in (values, old, returns)), ONE)[0] for row in range(3)]
    shares = [row / int(mask[n].sum()) if reduction == "sequence" else row for n, row in enumerate(rows)]
    whole = value_loss(values, old, returns, mask, reduction=reduction)[0]
    torch.testing.assert_close(whole, sum(shares))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_value_loss_ignores_everything_off_the_mask(poison):
    *tensors, mask = a_batch()
    gradients = []
    for values, old, returns in (tensors, poisoned(tensors, mask, poison)):
        values = values.clone().requires_grad_()
        value_loss(values, old, returns, mask, clip=0.2)[0].backward()
        gradients.append(values.grad)
    assert torch.equal(*gradients)
