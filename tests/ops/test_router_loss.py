import pytest
import torch

from openrlhf.ops.router_loss import load_balancing_loss


def test_two_tokens_and_two_experts_by_hand():
    """Both tokens choose expert 0, with probabilities 0.9 and 0.6: 2 * (1 * 0.75 + 0 * 0.25)."""
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
    assert load_balancing_loss([logits], 1).item() == pytest.approx(1.5)


def test_experts_that_are_used_alike_give_the_number_of_choices():
    logits = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]])
    assert load_balancing_loss([logits, logits], 2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_it_is_the_loss_of_transformers_of_the_real_tokens(top_k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(top_k)
    layers = tuple(torch.randn(12, 4, generator=generator) for _ in range(3))
    mask = torch.arange(12).view(3, 4) % 4 < 3
    expected = load_balancing_loss_func(layers, 4, top_k)
    torch.testing.assert_close(load_balancing_loss(layers, top_k), expected)
    expected = load_balancing_loss_func(layers, 4, top_k, mask.long())
    torch.testing.assert_close(load_balancing_loss([logits[mask.flatten()] for logits in layers], top_k), expected)


def test_the_gradient_evens_the_experts_out():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], requires_grad=True)
    load_balancing_loss([logits], 1).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()
