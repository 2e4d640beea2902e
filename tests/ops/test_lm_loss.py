"""The next-token loss."""

import math

import torch

from openrlhf.ops.lm_loss import next_token_loss


def test_the_next_token_loss_equals_cross_entropy_over_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 5, 11, generator=generator), torch.randint(0, 11, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.5
    labels = targets.masked_fill(~mask, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    log_probs = torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(next_token_loss(log_probs, mask), expected)


def test_padding_never_counts_whatever_it_holds():
    log_probs, mask = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[True, True, False]])
    log_probs.requires_grad_()
    loss = next_token_loss(log_probs, mask)
    loss.backward()
    assert loss.item() == 3.0
    assert log_probs.grad.tolist() == [[-1.0, -1.0, 0.0]]
