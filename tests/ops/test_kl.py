"""KL estimates and their coefficient."""

import math

import pytest
import torch

from openrlhf.ops.kl import ESTIMATORS, AdaptiveKLController, FixedKLController, approx_kl


@pytest.mark.parametrize(
    ("d", "expected"),
    [(0.5, [0.5, 0.125, 0.106531]), (-1.0, [-1.0, 0.5, 0.718282]), (0.0, [0.0, 0.0, 0.0])],
)
def test_estimators_equal_the_worked_numbers(d, expected):
    values = [approx_kl(torch.tensor(d), name).item() for name in ESTIMATORS]
    assert values == pytest.approx(expected, abs=1e-6)


def test_as_a_loss_k2_pulls_as_the_divergence_does_and_k1_nowhere():
    """Gradients averaged over the policy's own samples, against that of the exact divergence."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(6, generator=generator), torch.randn(6, generator=generator).log_softmax(0)

    def gradient(loss):
        free = logits.clone().requires_grad_()
        loss(free.log_softmax(0)).backward()
        return free.grad

    def average(name):
        return gradient(lambda own: (own.detach().exp() * approx_kl(own - reference, name)).sum())

    exact = gradient(lambda own: (own.exp() * (own - reference)).sum())
    torch.testing.assert_close(average("k2"), exact)
    torch.testing.assert_close(average("k1"), torch.zeros(6), atol=1e-6, rtol=0)
    assert torch.cosine_similarity(average("k3"), exact, dim=0) > 0.5


def test_k1_and_k3_average_to_the_true_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.log_softmax(torch.randn(6, generator=generator), 0) for _ in range(2))
    true = (policy.exp() * (policy - reference)).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * approx_kl(policy - reference, name)).sum(), true)


def test_k3_is_never_negative_and_never_overflows():
    d = torch.cat([torch.linspace(-1e4, 1e4, 1001), torch.linspace(-1e-3, 1e-3, 101)])
    k3 = approx_kl(d, "k3")
    assert (k3 >= 0).all() and k3.isfinite().all()


def test_an_unknown_estimator_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        approx_kl(torch.zeros(1), "k4")


def test_adaptive_coefficient_equals_the_worked_number():
    controller = AdaptiveKLController(0.01, target=0.1)
    controller.update(0.2, 1024)
    assert controller.value == pytest.approx(0.0102048, abs=1e-12)


def test_adaptive_coefficient_follows_the_divergence_in_both_directions():
    controller = AdaptiveKLController(0.01, target=0.1)
    controller.update(0.1, 5000)
    assert controller.value == 0.01
    controller.update(0.105, 10000)
    assert controller.value == pytest.approx(0.01 * 1.05)
    controller.update(0.0, 10000)
    assert controller.value == pytest.approx(0.01 * 1.05 * 0.8)


def test_one_huge_rollout_cannot_turn_the_coefficient_negative():
    controller = AdaptiveKLController(0.01, target=0.1)
    controller.update(0.0, 10_000_000)
    assert controller.value == pytest.approx(0.008)


def test_a_divergence_that_is_not_finite_leaves_the_coefficient_alone():
    controller = AdaptiveKLController(0.01, target=0.1)
    with pytest.raises(ValueError, match="nan"):
        controller.update(math.nan, 1)
    assert controller.value == 0.01


def test_a_target_of_zero_is_an_error():
    with pytest.raises(ValueError, match="target > 0"):
        AdaptiveKLController(0.01, target=0.0)


def test_the_adaptive_coefficient_survives_a_checkpoint():
    controller = AdaptiveKLController(0.01, target=0.1)
    controller.update(0.3, 4000)
    resumed = AdaptiveKLController(0.01, target=0.1)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value


def test_the_fixed_coefficient_is_a_setting_that_no_update_or_checkpoint_changes():
    controller = FixedKLController(0.01)
    controller.update(5.0, 1024)
    controller.load_state_dict(FixedKLController(0.5).state_dict())
    assert controller.value == 0.01
