"""Chunked log-probabilities against torch's own soft-max and autograd."""

import math

import pytest
import torch

from openrlhf.ops.logprobs import (
    both_from_logits,
    distilled_from_logits,
    distilled_log_probs,
    entropy_from_logits,
    filled,
    log_probs_and_entropy,
    log_probs_from_logits,
    token_log_probs,
)

N, H, V = 23, 8, 37


def a_head(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(V, H, generator=generator).to(dtype))
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    upstream = torch.randn(N, generator=generator)
    upstream[::3] = 0.0
    return hidden, weight, bias, targets, upstream


def naive(hidden, weight, targets, bias=None, temperature=1.0):
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    return torch.log_softmax(logits.float() / temperature, dim=-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("chunk_size", [1, 5, N, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_naive_ones(chunk_size, temperature, with_bias):
    hidden, weight, bias, targets, upstream = a_head()
    bias = bias if with_bias else None
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    ours = token_log_probs(hidden, weight, targets, bias=bias, temperature=temperature, chunk_size=chunk_size)
    expected = naive(hidden, weight, targets, bias, temperature)
    torch.testing.assert_close(ours, expected)
    for got, want in zip(
        torch.autograd.grad((ours * upstream).sum(), inputs), torch.autograd.grad((expected * upstream).sum(), inputs)
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_bf16_inputs_give_fp32_log_probs_and_gradients_in_bf16():
    hidden, weight, bias, targets, upstream = a_head(torch.bfloat16)
    ours = token_log_probs(hidden, weight, targets, bias=bias, chunk_size=5)
    assert ours.dtype == torch.float32
    expected = naive(*(x.detach().float() for x in (hidden, weight)), targets, bias.detach().float())
    assert (ours - expected).abs().max() < 0.1
    (ours * upstream).sum().backward()
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    (naive(wide[0], wide[1], targets, wide[2]) * upstream).sum().backward()
    for narrow, reference in zip((hidden, weight, bias), wide):
        assert narrow.grad.dtype == torch.bfloat16
        assert (narrow.grad.float() - reference.grad).norm() < 0.02 * reference.grad.norm()


def test_the_weight_gradient_of_bf16_chunks_is_summed_in_fp32():
    """One in bf16 is lost beside 256: a sum of 512 equal rows kept in bf16 would stop half-way."""
    rows = 512
    hidden, weight = (
        torch.ones(rows, 1, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16)),
    )
    token_log_probs(hidden, weight, torch.zeros(rows, dtype=torch.int64), chunk_size=1).mul(2).sum().backward()
    assert weight.grad.flatten().tolist() == [rows, -rows]


def test_only_the_gradients_that_are_needed_are_computed():
    hidden, weight, _, targets, _ = a_head()
    weight.requires_grad_(False)
    token_log_probs(hidden, weight, targets).sum().backward()
    assert weight.grad is None and hidden.grad is not None
    weight.requires_grad_(True)
    token_log_probs(hidden.detach(), weight, targets).sum().backward()
    assert weight.grad is not None


def test_nothing_is_kept_that_is_as_wide_as_the_vocabulary():
    hidden, weight, _, targets, _ = a_head()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        token_log_probs(hidden, weight, targets)
    assert all(V not in shape for shape in kept)


def test_the_weight_may_be_freed_after_the_forward_and_gathered_before_the_backward():
    hidden, weight, _, targets, upstream = a_head()
    expected = torch.autograd.grad((naive(hidden, weight, targets) * upstream).sum(), [hidden, weight])
    full = weight.data.clone()
    log_probs = token_log_probs(hidden, weight, targets, chunk_size=5)
    weight.data = torch.empty(0)
    weight.data = full
    got = torch.autograd.grad((log_probs * upstream).sum(), [hidden, weight])
    for ours, reference in zip(got, expected):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_are_filled_up_with_zeros_for_half_types_alone(dtype):
    rows = torch.randn(70, 4)
    whole = filled(rows, dtype)
    assert whole.dtype == dtype and len(whole) == (128 if dtype == torch.bfloat16 else 70)
    assert torch.equal(whole[:70], rows.to(dtype)) and not whole[70:].any()


def test_no_rows_give_no_log_probs_and_a_zero_gradient():
    _, weight, _, _, _ = a_head()
    hidden = torch.zeros(0, H, requires_grad=True)
    log_probs = token_log_probs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    log_probs.sum().backward()
    assert log_probs.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(V, H))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_without_a_gradient_never_poison_the_others(poison):
    hidden, weight, _, targets, upstream = a_head()
    keep = upstream != 0
    (torch.where(keep, token_log_probs(hidden, weight, targets), 0.0) * upstream).sum().backward()
    dirty = hidden.detach().masked_fill(~keep[:, None], poison).requires_grad_()
    other = torch.nn.Parameter(weight.detach().clone())
    (torch.where(keep, token_log_probs(dirty, other, targets), 0.0) * upstream).sum().backward()
    assert torch.equal(other.grad, weight.grad)
    assert torch.equal(dirty.grad, hidden.grad)


def test_a_gradient_that_is_not_a_number_is_passed_on():
    hidden, weight, _, targets, upstream = a_head()
    upstream[1] = math.nan
    (token_log_probs(hidden, weight, targets) * upstream).sum().backward()
    assert weight.grad.isnan().any()


def test_the_order_of_rows_does_not_matter():
    hidden, weight, _, targets, _ = a_head()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = token_log_probs(hidden[order], weight, targets[order], chunk_size=4)
    torch.testing.assert_close(shuffled, token_log_probs(hidden, weight, targets, chunk_size=9)[order])


def test_large_logits_do_not_overflow():
    hidden, weight, _, targets, _ = a_head()
    log_probs = token_log_probs(hidden * 1e4, weight, targets)
    assert log_probs.isfinite().all()
    torch.testing.assert_close(log_probs, naive(hidden * 1e4, weight, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_from_logits_equal_log_softmax(dtype):
    logits = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = torch.log_softmax(logits.float() / 0.7, dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(log_probs_from_logits(logits, targets, temperature=0.7), expected)


def a_teacher(vocabulary=V, seed=5):
    return 2.0 * torch.randn(N, vocabulary, generator=torch.Generator().manual_seed(seed))


def naive_cross_entropy(hidden, weight, teacher, bias=None):
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    return -(torch.softmax(teacher, -1) * torch.log_softmax(logits.float(), -1)).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 5, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_distilled_values_and_gradients_equal_the_naive_ones(chunk_size, with_bias):
    hidden, weight, bias, targets, upstream = a_head()
    bias, teacher = bias if with_bias else None, a_teacher()
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    ours = distilled_log_probs(hidden, weight, targets, teacher, bias=bias, chunk_size=chunk_size)
    expected = naive(hidden, weight, targets, bias), naive_cross_entropy(hidden, weight, teacher, bias)
    torch.testing.assert_close(ours, expected)
    sums = [(0.3 * pair[0] * upstream).sum() + (pair[1] * upstream.flip(0)).sum() for pair in (ours, expected)]
    for got, want in zip(*(torch.autograd.grad(total, inputs) for total in sums)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_cross_entropy_is_least_when_the_student_is_the_teacher():
    hidden, weight, _, targets, _ = a_head()
    _, cross_entropy = distilled_log_probs(hidden, weight, targets, (hidden @ weight.t()).detach())
    torch.testing.assert_close(cross_entropy, entropy_from_logits((hidden @ weight.t()).detach(), chunk_size=4))
    (grad,) = torch.autograd.grad(cross_entropy.sum(), weight)
    assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("vocabulary", [V - 6, V + 6])
def test_a_teacher_with_more_or_fewer_tokens_at_the_end_teaches_the_common_ones(vocabulary):
    hidden, weight, _, targets, _ = a_head()
    teacher = a_teacher(vocabulary)
    common = torch.full((N, V), -math.inf)
    common[:, : min(V, vocabulary)] = teacher[:, :V]
    log_probs, cross_entropy = distilled_log_probs(hidden, weight, targets, teacher)
    torch.testing.assert_close(log_probs, naive(hidden, weight, targets))
    torch.testing.assert_close(cross_entropy, naive_cross_entropy(hidden, weight, common))


def test_distillation_from_full_logits_gives_the_same():
    hidden, weight, _, targets, _ = a_head()
    teacher = a_teacher()
    expected = distilled_log_probs(hidden, weight, targets, teacher)
    torch.testing.assert_close(distilled_from_logits(hidden @ weight.t(), targets, teacher), expected)


def test_no_rows_distil_nothing():
    _, weight, _, _, _ = a_head()
    hidden, nothing = torch.zeros(0, H, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    log_probs, cross_entropy = distilled_log_probs(hidden, weight, nothing, torch.zeros(0, V))
    (log_probs.sum() + cross_entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(V, H))
    assert entropy_from_logits(torch.zeros(0, V)).shape == (0,)


@pytest.mark.parametrize("chunk_size", [1, 5, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_log_probs_with_entropy_and_their_gradients_equal_the_naive_ones(chunk_size, temperature, with_bias):
    hidden, weight, bias, targets, upstream = a_head()
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    logits = hidden @ weight.t() + (bias if with_bias else 0.0)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    expected = distribution.log_prob(targets), distribution.entropy()
    ours = log_probs_and_entropy(
        hidden, weight, targets, bias=bias if with_bias else None, temperature=temperature, chunk_size=chunk_size
    )
    pulls = upstream, upstream.roll(1)
    gradients = [
        torch.autograd.grad(sum((x * pull).sum() for x, pull in zip(both, pulls)), inputs) for both in (ours, expected)
    ]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(both_from_logits(logits, targets, temperature), expected)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
