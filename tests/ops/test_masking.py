"""Sums and whitening over a mask."""

import math

import pytest
import torch

from openrlhf.ops.masking import masked_sum, masked_whiten

POISON = [math.nan, math.inf, -math.inf]


def some_values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) < 0.6


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_the_sum_equals_a_loop_over_the_kept_entries(dim):
    x, mask = some_values()
    columns = (
        [(x, mask)] if dim is None else list(zip(x.unbind(1 if dim == 0 else 0), mask.unbind(1 if dim == 0 else 0)))
    )
    sums = torch.stack([values[kept].sum() for values, kept in columns])
    torch.testing.assert_close(masked_sum(x, mask, dim).flatten(), sums)


def test_a_mask_of_zeros_and_ones_works_like_a_boolean_one():
    x, mask = some_values()
    assert torch.equal(masked_sum(x, mask.long()), masked_sum(x, mask))


def test_the_sum_of_nothing_is_zero():
    x, _ = some_values()
    nothing = torch.zeros(4, 6, dtype=torch.bool)
    assert masked_sum(x, nothing) == 0
    assert torch.equal(masked_sum(x, nothing, dim=1), torch.zeros(4))


@pytest.mark.parametrize("poison", POISON)
def test_masked_entries_never_reach_result_or_gradient(poison):
    x, mask = some_values()
    for reduce in (masked_sum, lambda x, mask: masked_whiten(x, mask, 0.5, 2.0).square().sum()):
        clean = x.clone().requires_grad_()
        dirty = x.masked_fill(~mask, poison).requires_grad_()
        reduce(clean, mask).backward()
        reduce(dirty, mask).backward()
        torch.testing.assert_close(reduce(dirty, mask), reduce(clean, mask))
        torch.testing.assert_close(dirty.grad, clean.grad)


def test_whitened_entries_have_mean_zero_and_variance_one():
    x, mask = some_values()
    whitened = masked_whiten(x, mask, float(x[mask].mean()), float(1 / x[mask].std(unbiased=False)))
    assert whitened[mask].mean().abs() < 1e-6
    torch.testing.assert_close(whitened[mask].var(unbiased=False), torch.tensor(1.0))
    assert torch.equal(whitened[~mask], torch.zeros(int((~mask).sum())))
